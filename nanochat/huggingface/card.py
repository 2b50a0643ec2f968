"""The model card of an export: what the report and the evaluations of its run say, with YAML front matter that the Hub can read.

Every number comes from a file that a script wrote: the checkpoint's metadata, the runs' logs, the evaluations' summaries. What was not
measured is said in words.
"""
import json
import shlex

from nanochat import report as run_report
from nanochat.common import base_dir
from nanochat.dataset import HUB_VAL_SHARD, LOCAL_VAL_SHARD, shards_dir
from nanochat.data_recipes import MID, SFT

SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
LAST_MESSAGE = {"base": "pretraining only: it continues text and has not learned the conversation format", "mid": "pretraining and mid-training",
                "sft": "pretraining, mid-training and supervised fine-tuning", "rl": "pretraining, mid-training, supervised fine-tuning and reinforcement learning"}
# task -> (data set on the Hub, licence); tasks that are not here make their problems themselves or read a file of the user's
HUB_DATA = {
    "AQUA": ("deepmind/aqua_rat", "Apache-2.0"), "SmolTalk": ("HuggingFaceTB/smol-smoltalk", "Apache-2.0"), "MMLU": ("cais/mmlu", "MIT"),
    "GSM8K": ("openai/gsm8k", "MIT"), "ARC-Easy": ("allenai/ai2_arc", "CC-BY-SA-4.0"), "ARC-Challenge": ("allenai/ai2_arc", "CC-BY-SA-4.0"),
    "OpenThoughts": ("open-thoughts/OpenThoughts3-1.2M", "Apache-2.0"), "DolciThink": ("allenai/Dolci-Think-SFT-7B", "ODC-By"),
}
PRETRAINING = ("HuggingFaceFW/fineweb-edu", "ODC-By")
EMBEDDED = "embedded algebra"


def model_card(meta, num_params, command, name="", dtype="float32"):
    """The metadata of a checkpoint, its number of parameters, the command that exports it and the number format -> README.md as text."""
    from huggingface_hub import ModelCardData  # half a second that only an export spends
    stage, tag = meta.get("stage", "?"), meta.get("model_tag", "?")
    report = run_report.collect(run_report.Config())
    runs = [run for run in report["runs"] if run["model_tag"] == tag]
    rows = [row for row in report["evals"] if row["model_tag"] == tag]
    own = [row for row in rows if row["stage"] == stage and row["step"] == meta.get("step")]
    data, name = data_used(stage, runs), name or f"nanochat-{tag}-{stage}"
    front = ModelCardData(
        language="en", license="mit", library_name="transformers", pipeline_tag="text-generation", model_name=name,
        tags=["nanochat", "conversational", stage] + (["reinforcement-learning"] if stage == "rl" else []),
        datasets=sorted({hub_id for hub_id, _, _ in data if "/" in hub_id}) or None, metrics=["accuracy"] if own else None,
        eval_results=[result for row in own for result in eval_results(row, data)] or None)
    parts = [f"---\n{front.to_yaml().strip()}\n---", f"# {name}", overview(meta, num_params, dtype), results(own, rows, stage), limits(meta, own), usage(stage),
             data_section(data), origin(meta, runs, command), licence(data)]
    return "\n\n".join(parts) + "\n"


def eval_results(row, data):
    """An evaluation -> what the model-index holds of it: the accuracy with its interval, and beside it what blind answers score."""
    from huggingface_hub import EvalResult
    metrics, number = row["metrics"], run_report.is_number
    if not number(metrics["accuracy"]):
        return []
    task, split = str(row["task"]), str(row["split"] or "test")
    embedded = any(hub_id == EMBEDDED and used == task for hub_id, _, used in data)
    where = {"task_type": "text-generation", "task_name": "multiple choice" if metrics.get("letters_gold") else "question answering",
             "dataset_name": f"{task}, {EMBEDDED}" if embedded else task, "dataset_split": split,
             "dataset_type": "nanochat/embedded-algebra" if embedded else HUB_DATA.get(task, (f"nanochat/{task.lower()}",))[0]}
    interval = f", 95 % interval {metrics['ci_low']:.4f} to {metrics['ci_high']:.4f}" if number(metrics["ci_low"]) and number(metrics["ci_high"]) else ""
    found = [EvalResult(metric_type="accuracy", metric_value=round(metrics["accuracy"], 4), metric_name=f"accuracy of {row['n']} problems{interval}", **where)]
    blind = run_report.baseline(metrics)
    if number(blind):
        found.append(EvalResult(metric_type="blind_accuracy", metric_value=round(blind, 4), metric_name="accuracy of the best answers that do not read the question", **where))
    return found


# -- the text -----------------------------------------------------------------------------------------------------------

def overview(meta, num_params, dtype):
    sizes = meta["model_config"]
    return (f"A language model of {num_params:,} parameters, trained from scratch with nanochat-aquarat: {LAST_MESSAGE.get(meta.get('stage'), 'trained elsewhere')}. "
            f"{sizes['n_layer']} layers, width {sizes['n_embd']}, {sizes['n_head']} heads ({sizes['n_kv_head']} of keys and values), a context of "
            f"{sizes['sequence_len']} tokens, {sizes['vocab_size']} vocabulary rows; rotary positions, QK-norm, relu² MLP, soft-capped logits "
            "(`NanoChatForCausalLM`). " + ("The weights are those of the checkpoint, unchanged." if dtype == "float32" else
                                           f"The weights are the checkpoint's, rounded to {dtype}; what was measured was measured before."))


def results(own, rows, stage):
    others = [row for row in rows if row not in own and row["stage"] != stage]
    if not own:
        return ("## Results\n\nThis checkpoint has not been evaluated: no summary of it was there when it was exported "
                "(`python -m scripts.chat_eval` writes one). Nothing is claimed.")
    lines = ["## Results", "", *run_report.markdown_table(run_report.COLUMNS, [run_report.result_row(row) for row in own]), "", run_report.LEGEND]
    lines += ["", *(f"- **{row['task']} {row['split'] or ''}**: {row['verdict']}." for row in own if isinstance(row.get("verdict"), str))]
    if others:
        lines += ["", "The other stages of the same run, for comparison:", "", *run_report.markdown_table(run_report.COLUMNS, map(run_report.result_row, others))]
    return "\n".join(lines)


def limits(meta, own):
    """What the model cannot do, as far as its sizes, its stage and its evaluations tell."""
    lines = []
    weak = [f"{row['task']} {row['split'] or ''}".strip() for row in own if run_report.verdict(row) in ("no better", "below")]
    if weak:
        lines.append(f"On {', '.join(weak)} it is not shown to be better than answers that do not read the question.")
    lines += [
        "It is small: it knows few facts, states wrong ones fluently, and reasons only in the forms it was trained on. Outside the tasks in the table nothing was measured.",
        f"Question and answer together must fit {meta['model_config']['sequence_len']} tokens. English only.",
        "One run with one seed stands behind the numbers: the intervals cover the choice of problems, not the luck of training.",
        "No training for safety took place. Do not use it where a wrong or harmful answer matters.",
        "`transformers` does not execute the calculator and Python calls (`<|python_start|>`) that the project's own engine answers.",
    ]
    if meta.get("stage") == "base":
        lines.insert(0, "It has not learned the conversation format: the chat template works, the answers are noise.")
    return "\n".join(["## What it cannot do", "", *(f"- {line}" for line in lines)])


def usage(stage):
    call = ('ids = tokenizer("<|bos|>Once", return_tensors="pt").to(model.device)' if stage == "base" else
            'ids = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True)')
    return f"""\
## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
{call}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=128)[0]))
```

transformers 5 has the architecture built in, no code of ours runs. A text begins with `<|bos|>`, which the chat template writes and the plain tokenizer does not.
Texts of strangers outside the chat template belong through `tokenizer(text, split_special_tokens=True)`, so that they cannot hold special tokens.
`python -m scripts.export_to_hf --import PATH` makes it a checkpoint of the project again, bit for bit."""


def data_used(stage, runs):
    """[(data set or a description, licence or "", task)] of a stage and those before it, as the logs of the runs and the base directory tell."""
    found, aqua = [], base_dir() / "aqua" / "counts.json"
    shards = {path.name for path in shards_dir().glob("*.parquet")} if shards_dir().is_dir() else set()
    if HUB_VAL_SHARD in shards:
        found.append((*PRETRAINING, "pretraining"))
    elif LOCAL_VAL_SHARD in shards:
        made_here = (base_dir() / "offline_manifest.json").is_file()
        found.append(("text made from a seed by scripts.prepare_offline" if made_here else "a folder of the user's own", "", "pretraining"))
    try:
        embedded = json.loads(aqua.read_text(encoding="utf-8")).get("source") == "scripts.prepare_offline"
    except (OSError, ValueError, AttributeError):
        embedded = False
    order = list(SCRIPTS)
    for run in runs:
        if run["stage"] not in order or stage in order and order.index(run["stage"]) > order.index(stage):
            continue
        config = run["config"]
        recipes = {"mid": MID, "sft": SFT}.get(run["stage"], {})
        tasks = [task for task, _, _ in recipes.get(config.get("recipe") or config.get("sft_recipe"), [])]
        if run["stage"] == "rl":
            tasks = [str(config.get("task") or config.get("task_name") or "AQUA")]
        for task in tasks:
            if task.upper() == "AQUA":
                found.append((EMBEDDED, "", "AQUA") if embedded else (*HUB_DATA["AQUA"], "AQUA"))
            elif task in HUB_DATA:
                found.append((*HUB_DATA[task], task))
            else:
                found.append((f"{task}, made or kept on the user's machine", "", task))
    return list(dict.fromkeys(found))


def data_section(data):
    if not data:
        return "## Data\n\nNot recorded: the logs of the run and its data were not there when it was exported."
    lines = [f"- {task}: {hub_id}" + (f", {terms}" if terms else "") for hub_id, terms, task in data]
    if any(hub_id == EMBEDDED for hub_id, _, _ in data):
        lines.append("\nThe embedded algebra has AQuA-RAT's form and none of its problems: `tasks/algebra.py` makes them from a seed. No score on it is a score on AQuA-RAT.")
    return "\n".join(["## Data", "", *lines])


def origin(meta, runs, command):
    """The commit, the export's own command, and each stage's command with every knob, from the logs' headers."""
    lines = ["## How it was made", "", f"Exported by {run_report.git_state()}, step {meta.get('step')} of stage {meta.get('stage')}, model tag `{meta.get('model_tag')}`, "
             f"trained by {meta.get('world_size', 'an unknown number of')} process(es):",
             "", "```bash", command, "```"]
    order = list(SCRIPTS)
    last = order.index(meta["stage"]) if meta.get("stage") in order else -1
    commands = [stage_command(run) for run in runs if run["stage"] in order[:last + 1] and run["config"]]
    if commands:
        lines += ["", "<details><summary>The stages, with every knob as it was set</summary>", "", "```bash", *commands, "```", "", "</details>"]
    return "\n".join(lines)


def stage_command(run):
    flags = [f"--{name.replace('_', '-')}={shlex.quote(str(value))}" for name, value in run["config"].items()
             if value is not None and name not in ("resume", "overwrite") and isinstance(value, (str, int, float, bool)) and value != ""]
    return f"python -m scripts.{SCRIPTS[run['stage']]} {' '.join(flags)}"


def licence(data):
    terms = sorted({f"{hub_id} is {terms}" for hub_id, terms, _ in data if terms})
    return "## Licence\n\nThe weights are MIT, as the code that trained them." + (f" The data has its own terms: {', '.join(terms)}." if terms else "")
