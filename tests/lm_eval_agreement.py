"""The same problems through scripts.chat_eval and, after the export, through lm-evaluation-harness: answers, letters, accuracies.

    NANOCHAT_BASE_DIR=... python -m tests.lm_eval_agreement rl d4 100        # stage, model tag, problems of the embedded default's test split

lm-evaluation-harness drives transformers here, with its own batching, its own chat formatting and its own scoring; all that it gets from us
is the exported folder and the questions.
"""
import json
import math
import re
import sys
import tempfile
from pathlib import Path

from nanochat.common import base_dir
from nanochat.tokenizer import SPECIAL_TOKENS
from scripts import chat_eval, export_to_hf
from tasks.common import get_task
from tasks.evaluation import question_of

LETTERS = "ABCDE"
SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "num_fewshot": 0}
GENERATIVE = {**COMMON, "task": "ours_written", "output_type": "generate_until", "doc_to_target": "{{letter}}",
              "filter_list": [{"name": "letter", "filter": [{"function": "regex", "regex_pattern": r"(?m)^Answer: ([A-E])\s*\Z"}, {"function": "take_first"}]}],
              "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
CATEGORICAL = {**COMMON, "task": "ours_letters", "output_type": "multiple_choice", "gen_prefix": "Answer:", "target_delimiter": "",
               "doc_to_choice": [f" {letter}" for letter in LETTERS], "doc_to_target": "{{gold}}",
               "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}


def compare(stage, tag, folder, max_problems, max_new_tokens=64):
    """-> {"n", "ours", "lm_eval": accuracies, "same_text", "same_letter": counts, "largest_difference" of letter log-probabilities}."""
    ours = chat_eval.main(chat_eval.Config(source=stage, model_tag=tag, task_name="AQUA", split="test", data_dir=str(base_dir() / "aqua"), max_problems=max_problems,
                                           max_new_tokens=max_new_tokens, dtype="float32", device_type="cpu", batch_size=16))[0]
    answers = base_dir() / "eval" / f"{stage}_{tag}_AQUA_test_answers.jsonl"
    records = sorted(map(json.loads, answers.read_text(encoding="utf-8").splitlines()), key=lambda record: record["index"])
    exported = export_to_hf.main(export_to_hf.Config(source=stage, model_tag=tag, output=str(Path(folder) / "exported")))
    task = get_task("AQUA", split="test", stop=max_problems, data_dir=str(base_dir() / "aqua"))
    rows = [{"question": question_of(conversation), "letter": conversation["answer_letter"], "gold": LETTERS.index(conversation["answer_letter"])} for conversation in task]
    theirs = harness(exported, rows, Path(folder) / "harness", max_new_tokens)

    written, letters = ({sample["doc_id"]: sample for sample in theirs["samples"][name]} for name in ("ours_written", "ours_letters"))
    same_text = same_letter = 0
    largest, known = 0.0, dict(zip(LETTERS, range(5)))
    for place, record in enumerate(records):
        said = SPECIAL.sub("", record["completions"][0]["text"])  # the harness leaves special tokens out of what it decodes
        same_text += written[place]["resps"][0][0].strip() == said.strip()
        logprobs = [answer[0] if isinstance(answer[0], float) else float(answer[0][0]) for answer in letters[place]["filtered_resps"]]
        normalizer = math.log(sum(math.exp(value) for value in logprobs))
        own = record["no_reasoning"]["logprobs"]
        largest = max(largest, *(abs(logprobs[known[letter]] - normalizer - value) for letter, value in own.items()))
        same_letter += LETTERS[max(range(5), key=logprobs.__getitem__)] == record["no_reasoning"]["answer"]
    return {"n": len(records), "same_text": same_text, "same_letter": same_letter, "largest_difference": largest,
            "ours": (ours["metrics"]["accuracy"], ours["metrics"]["no_reasoning"]),
            "lm_eval": (theirs["results"]["ours_written"]["exact_match,letter"], theirs["results"]["ours_letters"]["acc,none"])}


def harness(exported, rows, folder, max_new_tokens, model="hf", model_args=None, tasks=("ours_written", "ours_letters")):
    """lm-evaluation-harness on the rows, generating and choosing, with the chat template. Without `model_args` it loads the exported folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for content in (GENERATIVE, CATEGORICAL):
        content = {**content, "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        if content["task"] == "ours_written":
            content["generation_kwargs"] = {"until": ["<|assistant_end|>"], "max_gen_toks": max_new_tokens, "do_sample": False}
        (folder / f"{content['task']}.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    model_args = model_args or {"pretrained": str(exported), "dtype": "float32"}
    return lm_eval.simple_evaluate(model=model, model_args=model_args, tasks=list(tasks), device="cpu", batch_size=16, apply_chat_template=True, log_samples=True, bootstrap_iters=0,
                                   task_manager=TaskManager(include_path=str(folder), include_defaults=False))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(compare(sys.argv[1], sys.argv[2], temporary, int(sys.argv[3]))))
