"""Our likelihoods beside lm-evaluation-harness's, request by request: on a Hugging Face model, and on our checkpoint and its twin."""
import json
import os
import random
from pathlib import Path

import pytest
import torch

from nanochat.compute import Compute
from nanochat.core_bundle import CoreTask, Item, load_bundle
from nanochat.core_eval import draw_examples, evaluate_task, render
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_model import HFScorer, load_hf
from nanochat.huggingface.folder import write_folder
from nanochat.huggingface.tokenizer import tokenizer_config, tokenizer_json
from nanochat.likelihood import GPTScorer
from nanochat.tokenizer import Tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is a dev dependency")

DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
CPU = Compute(torch.device("cpu"), torch.float64)
TOLERANCE = 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and models

def made_up_tasks(count):
    """Tasks of the shapes of piqa, copa, arc, winogrande and lambada, zero- and few-shot, out of a seed."""
    draw = random.Random(3)
    nouns = ("cat", "dog", "river", "stone", "engine", "letter", "winter", "garden")

    def sentence(length):
        return " ".join(draw.choice((*nouns, "the", "a", "runs", "under", "slowly", "12", "7,5")) for _ in range(length))

    def choices(number, length):
        return tuple(f"{place} {sentence(draw.randint(1, length))}" for place in draw.sample(nouns, number))

    def task(label, kind, shots, items, delimiter=" "):
        return CoreTask(label, kind, shots, 0.25, tuple(items), "", delimiter)

    piqa = [Item((f"Question: {sentence(8)}?",), choices(2, 9), draw.randrange(2)) for _ in range(count)]
    arc = [Item((f"Question: {sentence(12)}?",), choices(4, 4), draw.randrange(4)) for _ in range(count)]
    letters = [Item((f"Question: {sentence(9)}\nAnswer:",), ("A", "B", "C", "D"), draw.randrange(4)) for _ in range(count)]
    schema = [Item(tuple(f"{sentence(6)} {noun}" for noun in draw.sample(nouns, 2)), (f"was {sentence(3)}.",), draw.randrange(2)) for _ in range(count)]
    lambada = [Item((sentence(20),), (draw.choice(nouns),)) for _ in range(count)]
    return [task("piqa", "multiple_choice", 3, piqa, "\nAnswer: "), task("copa", "multiple_choice", 0, piqa), task("arc", "multiple_choice", 2, arc, "\nAnswer: "),
            task("letters", "multiple_choice", 2, letters), task("winogrande", "schema", 0, schema), task("lambada", "language_modeling", 0, lambada),
            task("lambada_fewshot", "language_modeling", 3, lambada)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for task in made_up_tasks(20) for item in task.items for text in (*item.contexts, *item.continuations)]
    return Tokenizer.train(texts, 420)


def save_tokenizer(tokenizer, folder, adds_bos):
    """Ours as a Hugging Face tokenizer; `adds_bos` makes it put <|bos|> in front by itself."""
    content = tokenizer_json(tokenizer)
    if adds_bos:
        content["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                                     "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                                     "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, 512)))


def llama_folder(tokenizer, folder, adds_bos):
    """A random Llama of two layers, in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=tokenizer.bos_id,
                                         eos_token_id=tokenizer.encode_special("<|assistant_end|>"), tie_word_embeddings=False))
    model.double().save_pretrained(folder)
    save_tokenizer(tokenizer, folder, adds_bos)
    return folder


def our_model(tokenizer):
    model = GPT(GPTConfig(sequence_len=512, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=32), torch.float64)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return model.double().eval()


def twin_folder(model, tokenizer, folder):
    """Our model as scripts.export_to_hf writes it, in float64."""
    write_folder(folder, model, tokenizer, {}, dtype=torch.float64)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The harness

def harness_scores(folder, tasks, tmp_path, count, adds_bos=None, dtype="float64", batch_size=4):
    """lm_eval.simple_evaluate over YAML tasks with our prompts' texts -> {label: [[(logprob, is_greedy) per choice] per item]}, {label: accuracy}.

    The few-shot part stands in the documents, since both must show the same examples; question, delimiter, choices and scoring are the harness's."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    folder_of_tasks = tmp_path / "tasks"
    folder_of_tasks.mkdir(exist_ok=True)
    for task in tasks:
        rows = [document(task, index) for index in range(min(count, len(task.items)))]
        (folder_of_tasks / f"{task.label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder_of_tasks / f"{task.label}.yaml").write_text(yaml_of(task, folder_of_tasks / f"{task.label}.jsonl"))
    model = HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=batch_size, **({} if adds_bos is None else {"add_bos_token": adds_bos}))
    found = lm_eval.simple_evaluate(model=model, tasks=[f"ours_{task.label}" for task in tasks], log_samples=True, bootstrap_iters=0,
                                    task_manager=TaskManager(include_path=str(folder_of_tasks), include_defaults=False))
    scores, accuracies = {}, {}
    for task in tasks:
        samples = sorted(found["samples"][f"ours_{task.label}"], key=lambda sample: sample["doc_id"])
        scores[task.label] = [[tuple(response[0] if isinstance(response[0], (tuple, list)) else response) for response in sample["resps"]] for sample in samples]
        accuracies[task.label] = found["results"][f"ours_{task.label}"]["acc,none"]
    return scores, accuracies


def document(task, index):
    """An item with its few-shot part as the harness's document. Of a schema, whose contexts differ, both whole."""
    item, pairs = task.items[index], render(task, task.items[index], draw_examples(task, index, 1234))
    contexts = [context.rstrip() for context, _ in pairs]   # with "Answer:"; the space after it is the harness's target_delimiter
    if task.kind == "schema":
        return {"contexts": contexts, "continuation": item.continuations[0], "gold": item.gold}
    return {"context": contexts[0], "choices": list(item.continuations), "gold": item.gold}


def yaml_of(task, path):
    lines = [f"task: ours_{task.label}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(path))}}}}}", "test_split: test",
             'target_delimiter: " "', "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"]
    if task.kind == "language_modeling":
        return "\n".join([*lines, "output_type: loglikelihood", 'doc_to_text: "{{context}}"', "doc_to_target: \"{{' ' + choices[0]}}\""])
    lines.append("output_type: multiple_choice")
    if task.kind == "schema":                           # contexts as choices, one target: the harness's form of Winograd schemas
        return "\n".join([*lines, "doc_to_text: gold", "doc_to_choice: contexts", "doc_to_target: continuation"])
    return "\n".join([*lines, 'doc_to_text: "{{context}}"', "doc_to_choice: choices", "doc_to_target: gold"])


def compare(tasks, scorer, expected, accuracies, count):
    """Asserts equality of every item -> (the largest difference of a log-likelihood, how many were compared)."""
    worst = compared = 0
    for task in tasks:
        records = [record for record in evaluate_task(task, scorer, CPU, batch_tokens=400) if record["index"] < count]
        assert len(records) == len(expected[task.label])
        by_sum = []
        for record, theirs in zip(records, expected[task.label]):
            assert record["cropped"] == 0
            differences = [abs(ours - other) for ours, (other, _) in zip(record["logprobs"], theirs, strict=True)]
            assert max(differences) < TOLERANCE, (task.label, record["index"], differences)
            assert record["greedy"] == [greedy for _, greedy in theirs], (task.label, record["index"])
            worst, compared = max(worst, *differences), compared + len(differences)
            # the harness's acc compares sums, CORE means: both from the same numbers
            by_sum.append(record["correct"] if task.kind == "language_modeling" else max(range(len(theirs)), key=record["logprobs"].__getitem__) == record["gold"])
        assert sum(by_sum) / len(by_sum) == accuracies[task.label], task.label
    print(f"{compared} log-likelihoods of {len(tasks)} tasks, largest difference {worst:.2g}")
    return worst, compared


# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_hugging_face_model_gets_the_harness_likelihoods(tokenizer, tmp_path, monkeypatch, adds_bos):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = llama_folder(tokenizer, tmp_path / "llama", adds_bos)
    tasks = made_up_tasks(6)
    expected, accuracies = harness_scores(folder, tasks, tmp_path, 6)
    scorer = HFScorer(*load_hf(folder, CPU))
    assert bool(scorer.bos) == adds_bos and scorer.sequence_len == 512
    assert compare(tasks, scorer, expected, accuracies, 6)[1] > 80


def test_our_checkpoint_its_twin_and_the_harness_agree(tokenizer, tmp_path):
    model = our_model(tokenizer)
    folder = twin_folder(model, tokenizer, tmp_path / "twin")
    tasks = made_up_tasks(6)
    expected, accuracies = harness_scores(folder, tasks, tmp_path, 6, adds_bos=True)
    compare(tasks, GPTScorer(model, tokenizer), expected, accuracies, 6)
    twin = HFScorer(*load_hf(folder, CPU))
    assert twin.bos == [tokenizer.bos_id], "a NanoChat has seen no text without <|bos|>"
    compare(tasks, twin, expected, accuracies, 6)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "core" / "core.yaml").is_file(), reason="needs the eval bundle beside the checkout")
@pytest.mark.parametrize("kind", ["llama", "ours"])
def test_on_the_published_tasks_all_agree(tokenizer, tmp_path, monkeypatch, kind):
    labels = ("copa", "piqa", "arc_easy", "openbook_qa", "commonsense_qa", "lambada_openai", "winograd", "bigbench_qa_wikidata")
    tasks = [CoreTask(**{**vars(task), "num_fewshot": min(task.num_fewshot, 1), "items": task.items[:60]}) for task in load_bundle(DATA / "core", labels)]
    sizes = {"sequence_len": 4096}
    if kind == "llama":
        folder = llama_folder(tokenizer, tmp_path / "llama", False)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": sizes["sequence_len"]}))
        scorer, adds_bos = HFScorer(*load_hf(folder, CPU)), None
    else:
        # Hugging Face's norm rounds to float32 even in float64, which comes to 1.3e-6 on the longest prompts: here it may not
        monkeypatch.setattr("transformers.models.nanochat.modeling_nanochat.NanoChatRMSNorm.forward", lambda self, x: self._norm(x))
        model = our_model(tokenizer)
        model.config = GPTConfig(**{**vars(model.config), **sizes})
        model.fill_rotary_table()
        folder, scorer, adds_bos = twin_folder(model, tokenizer, tmp_path / "twin"), GPTScorer(model, tokenizer), True
    expected, accuracies = harness_scores(folder, tasks, tmp_path, 60, adds_bos=adds_bos)
    assert compare(tasks, scorer, expected, accuracies, 60)[1] > 1000
