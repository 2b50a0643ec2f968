"""What several test files share: a two-layer pipeline's data, made once a session, in a folder of its own."""
import shutil
import signal
import threading

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # a suite started in the background ignores Ctrl-C, and so would every program that its tests start and interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A base directory with data and tokenizer, to be copied, not written to."""
    from tests import pipeline
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        pipeline.prepare()
    return folder


@pytest.fixture
def base_directory(prepared, tmp_path, monkeypatch):
    """A fresh copy of `prepared`, in force as NANOCHAT_BASE_DIR."""
    folder = tmp_path / "base"
    shutil.copytree(prepared, folder)
    for name in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR", "NANOCHAT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder
