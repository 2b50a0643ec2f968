"""Ours -> Hugging Face is exact in logits and ids, and back it is bit-equal; the card parses; what is torn is named and nothing is lost."""
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st

from nanochat.checkpoint_manager import load_model, stage_dir
from nanochat.huggingface.card import model_card
from nanochat.huggingface.folder import META, read_folder, write_folder
from nanochat.huggingface.tokenizer import CHAT_TEMPLATE, read_tokenizer, tokenizer_json
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, split_pattern
from scripts import export_to_hf
from tasks.common import get_task, task_names
from tests.checkpoints import noisy_model, save_small, small_tokenizer
from tests.fakes.hub_upload import Commands, UploadHub
from tests.test_tasks import DATA, build

ROOT = Path(__file__).parents[1]
CHUNKS = [*SPECIAL_TOKENS, "<|", "|>", "<|bos", "bos|>", "<\ufdd0", "\ufdd0|", " ", "  ", "\t", "\n", "\r\n", "\n \n", "\u00a0", "\u3000", "\u2028", "\x00", "\x1f", "1", "23",
          "4567890", "٣٤", "½", "\ufdd2", "a", "the", " cat", "Answer: A", "'s", "'LL", "'ſ", "it's", "ß", "İ", "é", "e\u0301", "你好", "привет", "🙂", "👩‍👩‍👧", "🇩🇪", "\u200d", "\ufeff",
          "(", "$x^2$", "...", "_", "\\", "\"", "<", ">", "|", "abab", "aaaa"]


def random_texts(count, seed):
    """Texts of special-token look-alikes, whitespace, digits, scripts, emoji, and any code point but surrogates."""
    draw = random.Random(seed)

    def piece():
        if draw.random() < 0.7:
            return draw.choice(CHUNKS)
        point = draw.choice((draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x110000)))
        return chr(point) if not 0xD800 <= point < 0xE000 else "\ufffd"

    return ["".join(piece() for _ in range(draw.randrange(13))) for _ in range(count)]


def is_markup(text):
    """The two spellings of noncharacters that the chat template needs for itself: the only texts whose ids are not equal."""
    return "<\ufdd0|" in text or "\ufdd2\ufdd2" in text


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(base directory, folder, model, tokenizer): a checkpoint of random weights and its export by the script."""
    base = tmp_path_factory.mktemp("export") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        model, tokenizer = save_small("rl")
        folder = export_to_hf.main(export_to_hf.Config(source="rl", model_tag="tiny"))
    return base, folder, model, tokenizer


@pytest.fixture(scope="module")
def theirs(exported):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(exported[1]), transformers.AutoTokenizer.from_pretrained(exported[1])


# -- weights ----------------------------------------------------------------------------------------------------------

def test_transformers_loads_it_as_nanochat_with_bit_equal_logits(exported, theirs):
    model, (hf_model, _) = exported[2], theirs
    assert type(hf_model).__name__ == "NanoChatForCausalLM" and hf_model.dtype == torch.float32
    assert hf_model.config.vocab_size == model.config.vocab_size > exported[3].vocab_size  # the padded rows are there
    for seed, (rows, length) in enumerate([(1, 1), (1, 7), (3, 40), (2, 64)]):
        inputs = torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert torch.equal(hf_model(inputs).logits, model(inputs)), (rows, length)


def test_generate_writes_what_our_engine_writes_and_stops_where_it_stops(exported, theirs):
    from nanochat.engine import Engine, Request
    _, _, model, tokenizer = exported
    hf_model, _ = theirs
    prompt = tokenizer.render_prompt([{"role": "user", "content": "What is 12 + 34?"}])
    ours = Engine(model, tokenizer).generate([Request(prompt, 1, 20, 0.0)])[0][0]
    out = hf_model.generate(torch.tensor([prompt]), max_new_tokens=20)[0, len(prompt):].tolist()
    stops = {tokenizer.bos_id, tokenizer.special_ids["<|assistant_end|>"]}
    assert hf_model.generation_config.eos_token_id == [tokenizer.special_ids["<|assistant_end|>"], tokenizer.bos_id]
    assert [token for token in out if token not in stops] == [token for token in ours.tokens if token not in stops]


def test_back_and_forth_is_bit_equal(exported, tmp_path, monkeypatch):
    base, folder, model, tokenizer = exported
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    place = export_to_hf.main(export_to_hf.Config(import_dir=str(folder)))
    original = base / place.relative_to(tmp_path / "other")
    assert (place / "model_000012.pt").read_bytes() == (original / "model_000012.pt").read_bytes()
    assert (tmp_path / "other" / "tokenizer" / "tokenizer.json").read_bytes() == (base / "tokenizer" / "tokenizer.json").read_bytes()
    before, after = (json.loads((path / "meta_000012.json").read_text()) for path in (original, place))
    assert {**before, "files": None} == {**after, "files": None}
    loaded, _, _ = load_model("rl", "cpu", dtype="float32")
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    again = export_to_hf.main(export_to_hf.Config())
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_bfloat16_export_holds_the_rounded_weights(exported, tmp_path):
    _, _, model, tokenizer = exported
    write_folder(tmp_path / "half", model, tokenizer, {"tokenizer": tokenizer.fingerprint}, dtype=torch.bfloat16)
    imported = read_folder(tmp_path / "half")
    assert all(torch.equal(imported.weights[name], weight.bfloat16().float()) for name, weight in model.state_dict().items())


# -- tokenizer --------------------------------------------------------------------------------------------------------

def test_ids_are_equal_on_ten_thousand_strings(exported, theirs):
    tokenizer, (_, hf_tokenizer) = exported[3], theirs
    texts = random_texts(10_200, seed=5)
    assert sum(any(name in text for name in SPECIAL_TOKENS) for text in texts) > 1_000
    ours = tokenizer.encode(texts)
    found = hf_tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    removed = {place for place, text in enumerate(texts) if is_markup(text)}
    assert len(texts) - len(removed) >= 10_000
    wrong = [(text, a, b) for place, (text, a, b) in enumerate(zip(texts, ours, found)) if a != b and place not in removed]
    assert not wrong, wrong[:3]
    plain = [text for text in texts if not any(name in text for name in SPECIAL_TOKENS) and not is_markup(text)]
    assert hf_tokenizer(plain)["input_ids"] == tokenizer.encode(plain)  # as anyone calls it
    assert hf_tokenizer.batch_decode(ours[:500]) == [tokenizer.decode(ids) for ids in ours[:500]]


@pytest.mark.parametrize("pattern", [split_pattern(1), split_pattern(3), r"\w+|\W+"])
def test_ids_are_equal_for_hostile_merges_and_other_patterns(pattern):
    """Two letters only: nearly every token can be made in several ways, which is where merge lists and ranks may part."""
    tokenizers = pytest.importorskip("tokenizers")
    for seed in range(6):
        draw = random.Random(seed)
        words = ["".join(draw.choices("ab", k=draw.randrange(1, 14))) for _ in range(300)]
        tokenizer = Tokenizer.train(iter([" ".join(words)]), 330, pattern=pattern)
        theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
        theirs.encode_special_tokens = True
        texts = ["".join(draw.choices("ab", k=draw.randrange(1, 40))) for _ in range(400)] + random_texts(100, seed)
        for text in texts:
            if not is_markup(text):
                assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text


def test_tokens_with_the_same_bytes_survive():
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"bc", b"abc", b"ab"]
    tokenizer = Tokenizer(tokens, split_pattern())
    content = tokenizer_json(tokenizer)
    assert len(content["model"]["vocab"]) == 261


def test_reading_gives_the_tokenizer_that_was_written(exported, tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"bc", b"abc"]
    for place, tokenizer in enumerate([exported[3], Tokenizer(tokens, split_pattern()), Tokenizer(tokens, r"\w+|\W+", SPECIAL_TOKENS[::-1])]):
        path = tmp_path / f"{place}.json"
        path.write_text(json.dumps(tokenizer_json(tokenizer)), encoding="utf-8")
        assert read_tokenizer(path).fingerprint == tokenizer.fingerprint


def test_the_converter_of_transformers_makes_a_file_that_we_read(exported, tmp_path):
    convert = pytest.importorskip("transformers.integrations.tiktoken").convert_tiktoken_to_fast
    pytest.importorskip("blobfile")
    convert(exported[3].tiktoken, tmp_path)
    found = read_tokenizer(tmp_path / "tokenizer.json")
    assert found.encode(random_texts(200, seed=9)) == exported[3].encode(random_texts(200, seed=9))


# -- conversations ----------------------------------------------------------------------------------------------------

def same_rendering(tokenizer, hf_tokenizer, conversation):
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**9)
    found = hf_tokenizer.apply_chat_template(conversation["messages"], return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == ids, conversation
    assert found["assistant_masks"] == mask, conversation
    prompt = hf_tokenizer.apply_chat_template(conversation["messages"][:-1], add_generation_prompt=True)["input_ids"]
    assert prompt == tokenizer.render_for_completion(conversation), conversation


REAL = {"AQUA": ("train", "aqua/train.jsonl"), "GSM8K": ("train", "gsm8k/train.jsonl"), "ARC-Challenge": ("test", "arc/arc_challenge_test.jsonl"),
        "MMLU": ("validation", "mmlu/val.jsonl")}


@pytest.mark.parametrize("name", task_names())
def test_the_chat_template_gives_our_ids_and_our_mask_on_every_task(exported, theirs, tmp_path, name):
    try:
        task = build(name, tmp_path)
    except RuntimeError as error:  # a task that executes code, on a machine without a sandbox
        pytest.skip(str(error))
    conversations = [task[index] for index in range(min(6, len(task)))]
    split, real = REAL.get(name, (None, None))
    if split and (DATA / real).is_file():
        task = get_task(name, split=split, data_dir=(DATA / real).parent)
        conversations += [task[index] for index in range(0, len(task), max(1, len(task) // 15))]
    for conversation in conversations:
        same_rendering(exported[3], theirs[1], conversation)


WORDS = st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=6).map("".join).filter(lambda text: not is_markup(text) and not text.startswith("\ufdd2") and not text.endswith("\ufdd2"))
# a call stands before every output, as the engine has it: see the template about a block's last character
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": WORDS}), min_size=1, max_size=4)


def called(parts):
    return [added for part in parts for added in ([{"type": "python", "text": "1"}, part] if part["type"] == "python_output" else [part])]


@settings(max_examples=100, deadline=None)
@given(st.booleans(), WORDS, st.lists(st.tuples(WORDS, st.one_of(WORDS, PARTS.map(called))), min_size=1, max_size=3))
def test_no_message_can_forge_a_special_token(exported, theirs, with_system, system, exchanges):
    messages = [{"role": "system", "content": system}] if with_system else []
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    same_rendering(exported[3], theirs[1], {"messages": messages})


@pytest.mark.parametrize("messages, problem", [
    ([{"role": "assistant", "content": "x"}], "turn of the user"), ([{"role": "user", "content": "x"}] * 2, "turn of the assistant"),
    ([{"role": "user", "content": ""}], "is empty"), ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "only the assistant"),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image", "text": "1"}]}], "type image"),
])
def test_the_template_refuses_what_our_renderer_refuses(theirs, messages, problem):
    from jinja2 import TemplateError
    assert theirs[1].chat_template == CHAT_TEMPLATE
    with pytest.raises(TemplateError, match=problem):
        theirs[1].apply_chat_template(messages)


# -- model card -------------------------------------------------------------------------------------------------------

def test_the_card_begins_with_yaml_that_the_hub_reads_and_prints_what_was_measured(exported):
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import model_index_to_eval_results
    text = (exported[1] / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["library_name"], front["pipeline_tag"]) == ("mit", "transformers", "text-generation")
    name, results = model_index_to_eval_results(front["model-index"])
    assert name == "nanochat-tiny-rl"
    assert [(result.metric_type, result.metric_value) for result in results] == [("accuracy", 0.4567), ("blind_accuracy", 0.2717)]
    assert "0.3912 to 0.5238" in results[0].metric_name
    assert ModelCard(text).data.to_dict()["license"] == "mit"
    assert "45.7 %" in text and "39.1 – 52.4" in text and "27.2 % (E)" in text and "## What it cannot do" in text and "commit " in text
    assert "python -m scripts.export_to_hf --source=rl --model-tag=tiny" in text and "python -m scripts.chat_rl --model-tag=tiny --max-steps=12 --task=AQUA" in text
    assert str(exported[0]) not in text and str(Path.home()) + "/" not in text


def test_a_card_without_measurements_claims_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_kv_head": 1, "sequence_len": 9, "vocab_size": 300}
    text = model_card({"stage": "sft", "model_tag": "x", "step": 3, "model_config": sizes}, 123, "python -m scripts.export_to_hf")
    front = yaml.safe_load(text.split("---\n")[1])
    assert "model-index" not in front and "datasets" not in front and "Nothing is claimed" in text and "Not recorded" in text


def test_the_card_survives_whatever_an_evaluation_file_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    save_small("sft")
    path = tmp_path / "eval" / "sft_tiny_AQUA_test.json"
    row = json.loads(path.read_text())
    for metrics in ({}, {"accuracy": "x"}, {"accuracy": float("nan")}, {"accuracy": 1, "ci_low": None}, {**row["metrics"], "best_constant": None}):
        path.write_text(json.dumps({**row, "task": "AQ: {\"UA\"\n---\n# x", "metrics": metrics}))
        text = model_card({"stage": "sft", "model_tag": "tiny", "step": 12, "model_config": {
            "n_layer": 1, "n_embd": 8, "n_head": 1, "n_kv_head": 1, "sequence_len": 9, "vocab_size": 300}}, 123, "x")
        front = text[4:text.index("\n---\n", 4)]
        assert yaml.safe_load(front)["license"] == "mit"


# -- what is torn or foreign ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", META])
def test_a_torn_folder_names_its_file_and_leaves_the_base_directory_alone(exported, tmp_path, monkeypatch, name):
    folder = exported[1]
    content, draw = (folder / name).read_bytes(), random.Random(name)
    for kind in range(20):
        torn, base, with_meta = tmp_path / f"torn{kind}", tmp_path / f"base{kind}", kind % 2 == 0 or name == META
        shutil.copytree(folder, torn)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        cut, where = draw.randrange(len(content)), draw.randrange(len(content))
        flipped = content[:where] + bytes([content[where] ^ 0x15]) + content[where + 1:]
        (torn / name).write_bytes({0: b"", 1: b"[]", 2: b"null", 3: os.urandom(300), 4: b"[" * 100_000, 5: b""}.get(kind, content[:cut] if kind < 12 else flipped))
        if not with_meta:
            (torn / META).unlink()
        try:
            export_to_hf.main(export_to_hf.Config(import_dir=str(torn), source="sft", model_tag="t"))
        except ValueError as error:
            assert str(torn) in str(error) and len(str(error)) < 1500, error
            assert not list(base.rglob("*"))
        else:
            assert kind >= 12 and (not with_meta or name == META), kind  # a flipped bit that only a checksum would have shown


@pytest.mark.parametrize("change, problem", [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}, "rotary positions"), ({"hidden_act": "silu"}, "hidden_act"),
    ({"model_type": "llama"}, "model_type"), ({"final_logit_softcapping": None}, "final_logit_softcapping"), ({"intermediate_size": 8192}, "intermediate_size"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"), ({"num_hidden_layers": 3}, "lacks 6 of 20 weights"), ({"num_hidden_layers": 1}, "does not know"),
    ({"num_attention_heads": -4}, "positive number"), ({"hidden_size": None}, "positive number"), ({"vocab_size": 10**12}, "positive number"),
])
def test_an_architecture_that_ours_does_not_cover_is_refused_by_name(exported, tmp_path, change, problem):
    folder = tmp_path / "changed"
    shutil.copytree(exported[1], folder)
    (folder / META).unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=problem):
        read_folder(folder)


def test_folders_of_transformers_4_and_5_and_in_shards_are_read(exported, theirs, tmp_path):
    theirs[0].save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    theirs[1].save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    for change in ({}, {"rope_parameters": None, "rope_theta": 10000.0}):
        (tmp_path / "saved" / "config.json").write_text(json.dumps({**content, **change}))
        imported = read_folder(tmp_path / "saved")
        assert all(torch.equal(imported.weights[name], weight) for name, weight in exported[2].state_dict().items())
        assert imported.tokenizer.fingerprint == exported[3].fingerprint


def test_an_export_that_fails_leaves_the_old_folder_and_no_other(exported, tmp_path, monkeypatch):
    _, _, model, tokenizer = exported
    write_folder(tmp_path / "out", model, tokenizer, {"tokenizer": tokenizer.fingerprint})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(tmp_path / "out", noisy_model(model.config.vocab_size, seed=9), tokenizer, {}, add=lambda folder: (_ for _ in ()).throw(RuntimeError("disk full")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not made by an export"):
        write_folder(tmp_path / "mine", model, tokenizer, {})
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_import_replaces_neither_a_checkpoint_nor_a_tokenizer_unasked(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    export_to_hf.main(export_to_hf.Config(import_dir=str(exported[1])))
    kept = (stage_dir("rl", "tiny") / "model_000012.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds rl checkpoints up to step 12"):
        export_to_hf.main(export_to_hf.Config(import_dir=str(exported[1])))
    small_tokenizer(300).save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="NANOCHAT_BASE_DIR"):
        export_to_hf.main(export_to_hf.Config(import_dir=str(exported[1]), overwrite=True))
    assert (stage_dir("rl", "tiny") / "model_000012.pt").read_bytes() == kept


# -- the Hub ----------------------------------------------------------------------------------------------------------

def test_push_uploads_the_folder_privately_and_the_hub_accepts_the_card(exported, tmp_path):
    base = exported[0]
    with UploadHub(tmp_path / "repos") as hub, Commands(hub, tmp_path / "home") as run:
        error, output = run(base, "scripts.export_to_hf", "-i", "rl", "--push", "me/tiny", "--dry-run")
        assert error is None and "nothing was sent" in output and hub.requests == []
        error, _ = run(base, "scripts.export_to_hf", "-i", "rl", "--push", "me/tiny")
        assert error is None, error
        assert hub.private == {"me/tiny": True} and all(hub.validated) and hub.validated and hub.commits == [("me/tiny", "rl tiny, step 12")]
        (base / "report").mkdir(exist_ok=True)
        for name in ("report.md", "report.html"):
            (base / "report" / name).write_text("numbers")
        error, _ = run(base, "scripts.sync_to_hub", "--repo-id", "me/release", "--public")
        assert error is None, error
        assert hub.private["me/release"] is False and (tmp_path / "repos" / "me" / "release" / "report.html").read_text() == "numbers"
        error, output = run(base, "scripts.export_to_hf", "-i", "rl", "--push", "me/other", token="hf_wrong")
        assert "hf auth login" in error and "hf_wrong" not in error + output
    sent = tmp_path / "repos" / "me" / "tiny"
    assert {path.name for path in sent.iterdir()} == {path.name for path in (base / "hf_export" / "tiny_rl").iterdir()}
    read_folder(sent)  # all checksums agree


@pytest.mark.slow
def test_lm_eval_agrees_with_chat_eval_on_the_same_items(prepared, tmp_path, monkeypatch):
    from tests import lm_eval_agreement, pipeline
    base = tmp_path / "base"
    shutil.copytree(prepared, base)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    for stage in ("base", "mid", "sft"):
        pipeline.run_stage(stage)
    result = lm_eval_agreement.compare("sft", "d2", tmp_path, max_problems=40, max_new_tokens=32)
    assert result["same_text"] == result["same_letter"] == result["n"] == 40
    assert result["ours"] == result["lm_eval"] and result["largest_difference"] < 2e-4
