"""The same problems through lm-evaluation-harness three times: its `hf` backend on the exported folder, and its `local-completions` and
`local-chat-completions` against scripts.chat_web. Answers, likelihoods and accuracies are the same.

    NANOCHAT_BASE_DIR=... python -m tests.lm_eval_served rl d4 100           # stage, model tag, problems of the embedded default's test split
"""
import json
import sys
import tempfile
from pathlib import Path

from nanochat.common import base_dir
from scripts import export_to_hf
from tasks.common import get_task
from tasks.evaluation import question_of
from tests.lm_eval_agreement import LETTERS, harness
from tests.serving import serve


def problems(count):
    task = get_task("AQUA", split="test", stop=count, data_dir=str(base_dir() / "aqua"))
    return [{"question": question_of(conversation), "letter": conversation["answer_letter"], "gold": LETTERS.index(conversation["answer_letter"])} for conversation in task]


def compare(stage, tag, folder, rows, max_new_tokens=64):
    """-> {"n"; "same_text", "same_chat_text": counts; "same_greedy", "largest_difference" of the likelihoods; "hf", "served": accuracies}."""
    folder = Path(folder)
    exported = export_to_hf.main(export_to_hf.Config(source=stage, model_tag=tag, output=str(folder / "exported")))
    found = {"hf": harness(exported, rows, folder / "hf", max_new_tokens)}
    with serve(source=stage) as server:
        for name, path, tasks in (("local-completions", "/v1/completions", ("ours_written", "ours_letters")),
                                  ("local-chat-completions", "/v1/chat/completions", ("ours_written",))):
            arguments = {"model": f"{stage}/{tag}", "base_url": server.url + path, "num_concurrent": 1, "max_retries": 1,
                         **({"tokenizer": str(exported)} if name == "local-completions" else {})}
            found[name] = harness(exported, rows, folder / name, max_new_tokens, name, arguments, tasks)

    def responses(name, task):
        return [sample["resps"] for sample in sorted(found[name]["samples"][task], key=lambda sample: sample["doc_id"])]

    def accuracies(name):
        results = found[name]["results"]
        return [results["ours_written"]["exact_match,letter"], *([results["ours_letters"]["acc,none"]] if "ours_letters" in results else [])]

    pairs = [(one[0], other[0]) for ours, theirs in zip(responses("local-completions", "ours_letters"), responses("hf", "ours_letters")) for one, other in zip(ours, theirs)]
    texts = {name: [answer for ((answer,),) in responses(name, "ours_written")] for name in found}
    return {"n": len(rows), "same_text": sum(a == b for a, b in zip(texts["hf"], texts["local-completions"])),
            "same_chat_text": sum(a == b for a, b in zip(texts["hf"], texts["local-chat-completions"])),
            "same_greedy": sum(a[1] == b[1] for a, b in pairs) / len(pairs), "largest_difference": max(abs(float(a[0]) - float(b[0])) for a, b in pairs),
            "hf": accuracies("hf"), "served": accuracies("local-completions"), "served_chat": accuracies("local-chat-completions")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(compare(sys.argv[1], sys.argv[2], temporary, problems(int(sys.argv[3])))))
