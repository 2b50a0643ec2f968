"""Evaluation questions in training data: each measure finds its own kind of copy, and the script's exit status says so."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import contamination
from tasks.common import get_task
from tasks.contamination import GRAM, MEASURES, HeldOut, forms, gram_set, normalised, training_texts, words
from tests.test_tasks import write_rows

ROOT = Path(__file__).parents[1]
QUESTION = "A train runs 60 km in 2 hours. How many km does it run in 7 hours at the same speed?"
COPIES = {  # text -> the measures that see it
    f"  {QUESTION}\n": set(MEASURES),
    "a TRAIN runs 60 km, in 2 hours; how many km does it run in 7 hours (at the same speed)": {"normalised", "number_blind", "jaccard", "ngram"},
    QUESTION.replace("60", "75.5").replace("7 hours", "9 hours"): {"number_blind"},
    QUESTION.replace("7 hours at the same speed", "7 days of rain and much wind"): {"jaccard", "ngram"},
    f"Long ago there was this one. {QUESTION} Nobody could say, and so on and so forth for many words that hide it well in a text": {"ngram"},
    "A train runs. How many hours?": set(), "": set()}


@pytest.mark.parametrize("text", COPIES)
def test_each_measure_finds_its_kind_of_copy(text):
    held_out = HeldOut({"X test": [QUESTION, "Another one entirely?"]})
    assert held_out.see([text]) == COPIES[text]
    facts = held_out.report()["X test"]
    assert {name for name in MEASURES if facts[name] == 1 and facts["train_rows"][name] == 1} == COPIES[text] and facts["questions"] == 2
    assert set(facts["examples"]) == COPIES[text]


def number_blind(text):
    return dict(forms(text, words(text)))["number_blind"]


def grams(text):
    return gram_set(words(text), GRAM)


def test_an_operator_is_a_word_and_a_hyphen_is_none():
    assert normalised("What is 3 + 5?") != normalised("What is 3-5?") == normalised("what is 3 - 5") and normalised("A well-known x") == normalised("a well known X!")
    assert number_blind("What is 3+5?") == number_blind("What is 12+1.5?") != number_blind("What is 3-5?")
    assert normalised("If 2(x+18)=40, what is x?") != normalised("If 2x+18=40, what is x?") and normalised("Why (so late)?") == normalised("why so late")
    assert words("It's $1,200.50 or 3/4") == ["it", "s", "1,200.50", "or", "3", "/", "4"]


def test_a_question_hidden_in_an_answer_is_found_in_the_whole_text():
    held_out = HeldOut({"X test": [QUESTION]})
    assert held_out.see(["Tell me a riddle."], f"Tell me a riddle.\nOf course! {QUESTION}") == {"ngram"}


def test_short_questions_are_no_ngrams_and_empty_ones_no_questions():
    held_out = HeldOut({"X test": ["How are you?", "", "?!"]})
    assert held_out.see(["How are you?"]) == {"exact", "normalised", "number_blind", "jaccard"} and held_out.see([""]) == set()
    assert held_out.see(["Well then, how are you?"], "Well then, how are you? ") == set()


def test_the_index_finds_what_comparing_every_pair_finds():
    r = random.Random(3)
    vocabulary = ["how", "many", "12", "7", "apples", "has", "ann"]
    train, held = ([" ".join(r.choice(vocabulary) for _ in range(r.randint(1, 16))) for _ in range(n)] for n in (400, 60))
    train += held[:3]
    held_out = HeldOut({"X test": held[:30], "Y test": held[30:]})
    for question in train:
        held_out.see([question])
    report = held_out.report()
    for split, questions in (("X test", held[:30]), ("Y test", held[30:])):
        def pairs(is_found):
            found = [(question, text) for question in questions for text in train if is_found(question, text)]
            return len({id(question) for question in questions if any(question is one for one, _ in found)})

        expected = {"exact": pairs(str.__eq__), "normalised": pairs(lambda a, b: words(a) == words(b)), "number_blind": pairs(lambda a, b: number_blind(a) == number_blind(b)),
                    "jaccard": pairs(lambda a, b: len(grams(a) & grams(b)) > 0.5 * len(grams(a) | grams(b))),
                    "ngram": pairs(lambda a, b: len(words(a)) >= 8 and any(gram in gram_set(words(b), min(13, len(words(a)))) for gram in gram_set(words(a), min(13, len(words(a))))
                                                                           if len(words(b)) >= min(13, len(words(a)))))}
        assert {name: report[split][name] for name in MEASURES} == expected and expected["jaccard"] > 1


def test_options_and_instructions_are_not_what_is_asked():
    task = get_task("ALGEBRA", split="validation", stop=1)
    asked, text = training_texts(task, task[0])
    assert len(asked) == 1 and "\n- " not in asked[0] and "Reason, then" not in asked[0] and "Answer: " in text
    chat = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]}
    assert training_texts(get_task("SpellingBee", size=1), chat) == (["One?", "Two?"], "One?\n1\nTwo?\n2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def row(question):
        return {"question": question, "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "So it is.", "correct": "B"}

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR"):
        monkeypatch.delenv(name, raising=False)
    aqua = tmp_path / "base" / "aqua"
    aqua.mkdir(parents=True)
    write_rows(aqua / "train.jsonl", [row(f"What is {i} apples and {i} pears together, if no one eats any of the fruit?") for i in range(20)])
    write_rows(aqua / "validation.jsonl", [row(QUESTION), row("What is 100 apples and 7 pears together, if no one eats any of the fruit?")])
    write_rows(aqua / "test.jsonl", [row("Nothing like it.")])
    write_rows(tmp_path / "base" / "identity_conversations.jsonl", [{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]}])
    return tmp_path


def test_a_clean_recipe_says_so_and_names_what_it_could_not_compare(folder, capsys, monkeypatch):
    monkeypatch.setattr(contamination, "HELD_OUT", {"AQUA": ("validation", "test"), "ARC-Easy": ("test",)})
    (folder / "evaluation" / "arc").mkdir(parents=True)
    report = contamination.main(contamination.Config(recipe="offline", eval_data_dir=str(folder / "evaluation"), against="ARC-Easy|SpellingBee"))
    assert not report["contaminated"] and list(report["left_out"]) == ["ARC-Easy test"] and report["splits"]["SpellingBee test"]["questions"] == 256
    report = contamination.main(contamination.Config(recipe="offline", stage="mid", against="AQUA"))
    assert not report["contaminated"] and report["rows"] == 21 and report["sources"] == {"AQUA": 20, "CustomJSON": 1}
    facts = report["splits"]["AQUA validation"]
    assert (facts["exact"], facts["normalised"], facts["number_blind"], facts["train_rows"]["number_blind"]) == (0, 0, 1, 20)
    assert json.loads((folder / "base" / "contamination" / "mid_offline.json").read_text()) == report
    assert "| AQUA validation | 2 |" in json.loads((folder / "base" / "report" / "contamination_mid_offline.json").read_text())["markdown"]
    output = capsys.readouterr().out
    assert "clean: none of the questions" in output and "ARC-Easy test is left out" in output


def test_a_contaminated_recipe_fails_with_status_1(folder):
    with open(folder / "base" / "identity_conversations.jsonl", "a") as file:
        file.write(json.dumps([{"role": "user", "content": QUESTION.upper()}, {"role": "assistant", "content": "210"}]) + "\n")
    report = contamination.main(contamination.Config(recipe="offline", against="AQUA"))
    assert report["contaminated"] and report["splits"]["AQUA validation"]["normalised"] == 1 and report["splits"]["AQUA test"]["normalised"] == 0
    assert report["verdict"].startswith("CONTAMINATED") and "AQUA validation (1)" in report["verdict"]
    assert not contamination.main(contamination.Config(recipe="offline", against="AQUA", fail_on=("exact",)))["contaminated"]
    run = subprocess.run([sys.executable, "-m", "scripts.contamination", "--recipe=offline", "--against=AQUA"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "CONTAMINATED" in run.stdout, run.stderr
    with pytest.raises(ValueError, match="choose one of default, offline"):
        contamination.main(contamination.Config(recipe="offlin"))
    with pytest.raises(ValueError, match="may hold exact, normalised"):
        contamination.main(contamination.Config(fail_on=("exactly",)))


def test_documents_and_the_rl_task_are_looked_through_as_well(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq
    shards = folder / "shards"
    shards.mkdir()
    pq.write_table(pa.table({"text": ["Nothing here.", f"A book of riddles. {QUESTION} The end."]}), shards / "one.parquet")
    pq.write_table(pa.table({"text": ["held out"]}), shards / "shard_val.parquet")
    report = contamination.main(contamination.Config(stage="base", data_dir=str(shards), against="AQUA", fail_on=("ngram",)))
    assert report["contaminated"] and report["rows"] == 2 and report["splits"]["AQUA validation"]["ngram"] == 1
    report = contamination.main(contamination.Config(stage="rl", against="AQUA", max_rows=5))
    assert not report["contaminated"] and report["rows"] == 5 and report["name"] == "rl_AQUA"
