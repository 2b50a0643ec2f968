"""Reference nanochat checkpoints (October 2025) import with equal logits and ids; what is newer, torn or hostile is refused by name."""
import json
import pickle
import random
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import load_model, stage_dir
from scripts import export_to_hf
from tests.checkpoints import noisy_model, small_tokenizer


def write_reference(folder, change=None, prefix="_orig_mod.", config=None):
    """A checkpoint as the reference writes it -> (its model, the tokenizer): compiled names, a bfloat16 embedding, a pickled tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = small_tokenizer()
    model = noisy_model(tokenizer.vocab_size, n_kv_head=4)
    state = dict(model.state_dict())
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    model.load_state_dict(state)  # the oracle computes with the rounded embedding
    torch.save({f"{prefix}{name}": tensor for name, tensor in {**state, **(change or {})}.items()}, folder / "model_000650.pt")
    meta = {"step": 650, "val_bpb": 0.9, "user_config": {"run": "d2", "depth": 2, "max_seq_len": 64, "device_batch_size": 4, "total_batch_size": 512},
            "model_config": {"sequence_len": 64, "vocab_size": tokenizer.vocab_size, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 32, **(config or {})}}
    (folder / "meta_000650.json").write_text(json.dumps(meta))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.tiktoken))
    torch.save(torch.tensor(tokenizer.token_bytes(), dtype=torch.int32), folder / "token_bytes.pt")
    return model, tokenizer


def bring_in(folder, **flags):
    return export_to_hf.main(export_to_hf.Config(import_dir=str(folder), source="base", model_tag="ref", **flags))


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_logits_and_ids_are_equal_to_the_bit(base, tmp_path, prefix):
    model, tokenizer = write_reference(tmp_path / "ref", prefix=prefix)
    bring_in(tmp_path / "ref")
    loaded, found, meta = load_model("base", "cpu", dtype="float32")
    inputs = torch.randint(0, tokenizer.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))
    assert found.fingerprint == tokenizer.fingerprint and found.encode("naïve 123 <|bos|>") == tokenizer.tiktoken.encode_ordinary("naïve 123 <|bos|>")
    assert (meta["step"], meta["config"]["max_seq_len"], meta["config"]["total_batch_size"], meta["reference"]["val_bpb"]) == (650, 64, 512, 0.9)


def test_transformers_computes_the_logits_of_an_imported_reference_too(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = write_reference(tmp_path / "ref")
    bring_in(tmp_path / "ref")
    folder = export_to_hf.main(export_to_hf.Config(source="base"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = torch.randint(0, tokenizer.vocab_size, (2, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(theirs(inputs).logits, model(inputs))


def test_an_imported_base_model_starts_the_next_stage(base_directory, tmp_path):
    """Mid-training takes lengths and batch sizes from its parent, so the reference's flags must have arrived."""
    from nanochat.configurator import inherit
    from scripts import mid_train
    (base_directory / "tokenizer" / "tokenizer.json").unlink()
    write_reference(tmp_path / "ref")
    bring_in(tmp_path / "ref")
    _, _, parent = load_model("base", "cpu", dtype="float32")
    config = inherit(mid_train.Config(), {**parent["config"], "step": parent["step"]}, "max_seq_len", "device_batch_size", "total_batch_size", "mask_documents")
    assert (config.max_seq_len, config.device_batch_size, config.total_batch_size) == (64, 4, 512)


def test_the_tokenizer_may_lie_in_the_base_directory_of_the_reference(base, tmp_path):
    place = tmp_path / "theirs" / "base_checkpoints" / "d2"
    write_reference(place)
    (tmp_path / "theirs" / "tokenizer").mkdir()
    for name in ("tokenizer.pkl", "token_bytes.pt"):
        (place / name).rename(tmp_path / "theirs" / "tokenizer" / name)
    bring_in(place)
    (tmp_path / "theirs" / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="by --tokenizer"):
        bring_in(place, overwrite=True)
    bring_in(place, tokenizer=str(tmp_path / "elsewhere"), overwrite=True)


@pytest.mark.parametrize("key", ["resid_lambdas", "x0_lambdas", "value_embeds.1.weight", "transformer.h.0.attn.ve_gate.weight", "smear_gate.weight", "backout_lambda"])
def test_weights_of_a_newer_nanochat_are_refused_by_name(base, tmp_path, key):
    write_reference(tmp_path / "ref", change={key: torch.ones(2)})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        bring_in(tmp_path / "ref")
    assert not list(base.rglob("*.pt"))


@pytest.mark.parametrize("config, problem", [({"window_pattern": "SSSL"}, "window_pattern"), ({"n_layer": 3}, "lacks 6 of 20"), ({"n_embd": 64}, "instead of floating-point"),
                                             ({"vocab_size": 10}, "different models|instead of"), ({"n_head": 5}, "even head size"), ({"n_layer": "2"}, "positive number")])
def test_sizes_that_do_not_fit_are_refused(base, tmp_path, config, problem):
    write_reference(tmp_path / "ref", config=config)
    with pytest.raises(ValueError, match=problem):
        bring_in(tmp_path / "ref")


class Hostile:
    def __reduce__(self):
        return (Path("/nonexistent-owned").write_text, ("x",))


@pytest.mark.parametrize("name", ["model_000650.pt", "tokenizer.pkl", "token_bytes.pt", "meta_000650.json"])
def test_torn_and_hostile_files_are_named_and_nothing_is_saved(base, tmp_path, name):
    folder = tmp_path / "ref"
    write_reference(folder)
    content, draw = (folder / name).read_bytes(), random.Random(name)
    damages = [b"", draw.randbytes(500), pickle.dumps(Hostile()), b"[]", b"{}", b"null", *[content[:draw.randrange(len(content))] for _ in range(6)], *[draw.randbytes(500) for _ in range(20)]]
    for damage in damages:
        (folder / name).write_bytes(damage)
        with pytest.raises(ValueError) as caught:
            bring_in(folder)
        assert str(folder) in str(caught.value), caught.value
        assert not list(base.rglob("*.pt")) and not list(base.rglob("meta_*.json"))
    with pytest.raises(ValueError, match="no folder"):
        bring_in(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither config.json nor a meta"):
        bring_in(tmp_path / "empty")


def test_a_checkpoint_of_ours_in_another_base_directory_is_imported_with_its_checksums(base, tmp_path, monkeypatch):
    from tests.checkpoints import save_small, weights_of
    save_small("sft")
    original = weights_of("sft", "tiny")
    folder = stage_dir("sft", "tiny")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "second"))
    place = export_to_hf.main(export_to_hf.Config(import_dir=str(folder)))
    assert place == tmp_path / "second" / "chatsft_checkpoints" / "tiny"
    assert (place / "model_000012.pt").read_bytes() == (folder / "model_000012.pt").read_bytes() and original
    (folder / "model_000012.pt").write_bytes((folder / "model_000012.pt").read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="SHA-256"):
        export_to_hf.main(export_to_hf.Config(import_dir=str(folder), overwrite=True))
    assert load_model("sft", "cpu", dtype="float32")[2]["step"] == 12
