"""The server under many clients, under nonsense, for long, and under the tools that others bring: nothing leaks, nothing breaks."""
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch

from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine, Request
from nanochat.serving.described import ChatCompletion, Completion
from scripts import chat_web
from tests.serving import SECONDS, get, make_base, said, serve, wait_until_idle, written

PAGE = Path(chat_web.__file__).with_name("chat_web.html")
MALFORMED = [("/v1/chat/completions", b"{", 400), ("/v1/chat/completions", b'{"messages": []}', 400), ("/v1/completions", b'{"prompt": [[100000]]}', 400),
             ("/v1/completions", b'{"prompt": "x", "temperature": -1}', 400), ("/v1/completions", b'{"prompt": "x", "model": "none"}', 404),
             ("/v1/none", b"{}", 404), ("/v1/completions", b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 413), ("/v1/chat/completions", b"\xff", 400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for name in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR", "NANOCHAT_API_KEY"):
            patch.delenv(name, raising=False)
        make_base(folder, stages=("rl",), sequence_len=128)
        yield folder


@pytest.fixture(scope="module")
def engine(folder):
    model, tokenizer, _ = load_model("rl", "cpu", dtype="float32")
    return Engine(model, tokenizer)


def expected_answers(engine, count, seed=0):
    """-> [(path, body, the text of the greedy answer given alone)]"""
    draw, work = random.Random(seed), []
    for i in range(count):
        words = " ".join(draw.choice(("Ann", "has", "10", "boxes", "cups", "how", "many", "naïve", "東京", "+")) for _ in range(draw.randint(1, 14)))
        most = draw.randint(1, 40)
        if i % 2:
            path, body, prompt = "/v1/completions", {"prompt": words}, engine.tokenizer.encode(words, prepend="<|bos|>")
        else:
            messages = [{"role": "user", "content": words}]
            path, body, prompt = "/v1/chat/completions", {"messages": messages}, engine.tokenizer.render_prompt(messages)
        ((completion,),) = engine.generate([Request(prompt, max_new_tokens=most, temperature=0.0)])
        text = written(engine.tokenizer, completion) if i % 2 else said(completion)
        work.append((path, {**body, "temperature": 0, "max_tokens": most}, text))
    return work


async def storm(url, work, requests, clients, seed=0, cancelled=0.2, malformed=0.05):
    """-> Counter of what happened. AssertionError at the first wrong answer."""
    draw, seen, gate = random.Random(seed), Counter(), asyncio.Semaphore(clients)
    # With its 5 s, on a busy machine, httpx closes idle connections that it has just given to a request
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients, keepalive_expiry=60)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, headers={"content-type": "application/json"}) as client:
        async def one(kind, path, body, text, stream, patience):
            async with gate:
                if kind == "malformed":
                    reply = await client.post(path, content=body)
                    assert reply.status_code == text and "error" in reply.json(), reply.text
                elif kind == "cancelled":
                    got = ""
                    async with client.stream("POST", path, json={**body, "stream": True}) as reply:
                        assert reply.status_code == 200
                        async for line in reply.aiter_lines():
                            got += text_of(line)
                            patience -= 1
                            if patience < 0:
                                break
                    assert text.startswith(got)
                elif stream:
                    reply = await client.post(path, json={**body, "stream": True})
                    assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n"), reply.text
                    assert "".join(map(text_of, reply.text.splitlines())) == text
                else:
                    reply = await client.post(path, json=body)
                    assert reply.status_code == 200, reply.text
                    choice = reply.json()["choices"][0]
                    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == text
                seen[kind] += 1

        tasks = []
        for _ in range(requests):
            chance = draw.random()
            if chance < malformed:
                tasks.append(one("malformed", *draw.choice(MALFORMED), False, 0))
            else:
                kind = "cancelled" if chance < malformed + cancelled else "answered"
                tasks.append(one(kind, *draw.choice(work), draw.random() < 0.5, draw.randint(0, 12)))
        await asyncio.gather(*tasks)
    return seen


def text_of(line):
    """A line of a stream -> its text."""
    if not line.startswith("data: {"):
        return ""
    event = json.loads(line[6:])
    assert "error" not in event, event
    choice = event["choices"][0]
    return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


def check_storm(engine, requests, clients, prompts):
    work = expected_answers(engine, prompts)
    with serve() as server:
        seen = asyncio.run(storm(server.url, work, requests, clients))
        wait_until_idle(server)
        assert seen.total() == requests and min(seen["answered"], seen["cancelled"], seen["malformed"]) > 0
        statuses = Counter(re.findall(r'nanochat_requests_total\{.*status="(\d+)"\}', get(server.url + "/metrics").text))
        assert set(statuses) <= {"200", "400", "404", "413", "0", "499"}, statuses
        assert "nanochat_engine_errors_total" not in re.sub("#.*", "", get(server.url + "/metrics").text)
        # the same server, alone again: still the same answers
        assert asyncio.run(storm(server.url, work, 5, 1, seed=1, cancelled=0, malformed=0)) == {"answered": 5}
    return seen


def test_many_clients_at_once_get_the_answers_they_would_get_alone(engine):
    check_storm(engine, requests=150, clients=24, prompts=30)


@pytest.mark.slow
def test_two_thousand_requests_of_64_clients(engine):
    print(check_storm(engine, requests=2000, clients=64, prompts=200))


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_requests(folder, engine):
    """In a process of its own; what grows is what it has after the first 2,000 requests."""
    work = expected_answers(engine, 40)
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", "-i", "rl", "-p", "0", "-d", "float32", "--device-type", "cpu", "--access-log=False"],
                               cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        sizes = []
        for round in range(10):
            asyncio.run(storm(url, work, 1000, 32, seed=round))
            prompts = [[5, 6, 7, round]] * 8
            assert httpx.post(timeout=SECONDS, url=url + "/v1/completions", json={"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}).status_code == 200
            sizes.append(int(re.search(r"nanochat_resident_bytes (\d+)", get(url + "/metrics").text)[1]))
            print(f"{1000 * (round + 1)} requests: {sizes[-1] / 2**20:.1f} MiB", flush=True)
        assert sizes[-1] - sizes[1] < 16 << 20, sizes
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzed from its own description

def fuzz(server, examples):
    """Requests that fit the OpenAPI and requests that do not: never a 5xx, and status, content type and body of every answer as described there.

    Not every request that fits is accepted: that a conversation ends with the user, say, no schema can tell."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode, openapi
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
    schema = openapi.from_dict(get(server.url + "/openapi.json").json())
    tried = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            try:
                strategy = operation.as_strategy(generation_mode=mode)

                @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
                @given(strategy)
                def run(case):
                    nonlocal tried
                    reply = case.call(base_url=server.url, timeout=SECONDS)
                    tried += 1
                    assert reply.status_code < 500, (case.path, case.body, reply.text)
                    # it does not know that a 413 refuses too
                    case.validate_response(reply, excluded_checks=[positive_data_acceptance] + [negative_data_rejection] * (reply.status_code == 413))
                run()
            except Unsatisfiable:  # nothing about it can be wrong
                assert mode is GenerationMode.NEGATIVE and not (operation.body or operation.query), operation.label
    wait_until_idle(server)
    return tried


def test_fuzzed_requests_give_no_server_error(folder):
    with serve(page=PAGE, routers=(chat_web.router,), settings=chat_web.Settings(max_tokens=4, max_tokens_limit=8)) as server:
        assert fuzz(server, examples=4) > 60
        described = get(server.url + "/openapi.json").json()
        assert not any("422" in operation["responses"] for path in described["paths"].values() for operation in path.values())
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                assert operation["responses"]["200"]["content"].values() and {} not in [each["schema"] for each in operation["responses"]["200"]["content"].values()], path


@pytest.mark.parametrize("path, body", [("/v1/chat/completions", {"messages": [{"role": "user", "content": "cups"}]}), ("/v1/completions", {"prompt": "cups"})])
def test_streams_and_scored_answers_are_as_described_too(folder, path, body):
    """What the fuzzer seldom hits: log-probabilities, echo, several choices, chunks of a stream."""
    model = ChatCompletion if "messages" in body else Completion
    with serve() as server:
        media_types = get(server.url + "/openapi.json").json()["paths"][path]["post"]["responses"]["200"]["content"]
        assert media_types["application/json"]["schema"]["$ref"].endswith("/" + model.__name__)
        extra = [{}, {"n": 3, "temperature": 2}, {"stop": "e"}, {"logprobs": True, "top_logprobs": 3} if "messages" in body else {"logprobs": 2, "echo": True}]
        for more in extra:
            reply = httpx.post(server.url + path, json={**body, "max_tokens": 6, **more}, timeout=SECONDS)
            assert reply.status_code == 200
            model.model_validate(reply.json(), strict=True)
        streamed = httpx.post(server.url + path, json={**body, "max_tokens": 6, "stream": True, **extra[-1]}, timeout=SECONDS)
        assert streamed.headers["content-type"].partition(";")[0] in media_types
        wait_until_idle(server)


NASTY = [b'{"prompt": "x", "seed": 1e400}', b'{"prompt": "x", "n": 1' + b"0" * 400 + b"}", b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x", "top_p": -NaN}',
         b'{"prompt": "x", "max_tokens": 9223372036854775808}', b'{"prompt": [[18446744073709551616]]}', b'{"prompt": "\\ud800\\udc00\\udfff", "max_tokens": 2}',
         '{"prompt": "\u202e\U0010ffff\ufdd0𝔘", "max_tokens": 2}'.encode(), b'{"prompt": "\\u0000", "max_tokens": 2}', b'{"prompt": "x", "stop": ["\\u0000", "\\udfff"], "max_tokens": 2}',
         *(f'{{"prompt": "x", "{name}": {value}, "max_tokens": 3{more}}}'.encode() for name in ("top_p", "temperature") for value in ("1e-48", "5e-324", "1e-38", "1e-7")
           for more in ("", ', "top_k": 0', ', "top_k": 3', ', "top_p": 1e-40, "top_k": 0' if name == "temperature" else ', "temperature": 2')),
         b'{"prompt": "x", "stream": "yes"}', b'{"prompt": "x", "stream": true, "max_tokens": 2, "prompt": "y"}', b'{"prompt": "x", "": 1}', b'{"prompt": {"a": 1}}',
         b"[" * 50_000 + b"]" * 50_000, b'{"prompt": ' + b'["x", ' * 3000 + b'"x"' + b"]" * 3000 + b"}", b'"', b"", b"\x00", b"{}" * 9, b'{"a": 1, "a": 2}']


@pytest.mark.parametrize("stream", [False, True])
def test_unicode_huge_numbers_and_nan_give_no_server_error(folder, stream):
    with serve(settings=chat_web.Settings(max_tokens=4, max_tokens_limit=8)) as server:
        for body in NASTY:
            for path in ("/v1/completions", "/v1/chat/completions"):
                content = body.replace(b"{", b'{"stream": true, ', 1) if stream and body.startswith(b'{"prompt') else body
                if "chat" in path:
                    content = content.replace(b'"prompt": "', b'"messages": [{"role": "user", "content": "a"}], "user": "')
                reply = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=SECONDS)
                assert reply.status_code < 500 and '"type":"server_error"' not in reply.text, (path, content[:100], reply.text)
                assert reply.status_code == 200 or set(reply.json()["error"]) == {"message", "type", "param", "code"}
        wait_until_idle(server)


@pytest.mark.slow
def test_many_fuzzed_requests_give_no_server_error(folder):
    with serve(page=PAGE, routers=(chat_web.router,), settings=chat_web.Settings(max_tokens=4, max_tokens_limit=8)) as server:
        print(fuzz(server, examples=150), "requests")


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness

@pytest.mark.slow
def test_lm_evaluation_harness_gets_the_same_from_the_server_as_from_the_exported_folder(folder, tmp_path, monkeypatch):
    """Generation and choice, by token ids and by chat: a random model, which ends late and seldom says what it should."""
    from tests import lm_eval_served
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    draw = random.Random(2)
    rows = [{"question": f"Ann has {draw.randint(10, 99)} cups?", "letter": "ABCDE"[i % 5], "gold": i % 5} for i in range(20)]
    found = lm_eval_served.compare("rl", "d2", tmp_path, rows, max_new_tokens=16)
    print(found)
    assert found["hf"] == found["served"] and found["hf"][:1] == found["served_chat"]
    assert found["same_greedy"] == 1 and found["largest_difference"] < 1e-3 and found["same_text"] >= 15 and found["same_chat_text"] >= 15


@pytest.mark.slow
def test_lm_evaluation_harness_scores_as_computed_directly(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import lm_eval
    from lm_eval.tasks import TaskManager
    draw, rows = random.Random(1), []
    for _ in range(30):
        a, b = draw.randint(10, 49), draw.randint(10, 49)
        rows.append({"question": f"{a} + {b} =", "choices": [str(a + b), str(a + b + 1), str(a - b)], "answer": draw.randrange(3)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    (tmp_path / "mc.yaml").write_text(f"task: our_mc\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: choices\n"
                                      "doc_to_target: answer\nmetric_list: [{metric: acc}]\n")
    (tmp_path / "gen.yaml").write_text(f"task: our_gen\n{common}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{choices[0]}}}}'\n"
                                       "generation_kwargs: {until: [\"\\n\", \"e\"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n")
    manager = TaskManager(include_path=str(tmp_path))

    def run(model, path, tasks, **settings):
        arguments = f"model=rl,base_url={server.url}{path},max_retries=1,max_length=128"
        result = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings)
        return {task: [sample["resps"] for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"])] for task in tasks}, result["results"]

    def greedy(prompt, is_chat=False):
        ((completion,),) = engine.generate([Request(prompt, max_new_tokens=12, temperature=0.0)])
        return re.split("\n|e", said(completion) if is_chat else written(tokenizer, completion), maxsplit=1)[0]

    tokenizer = engine.tokenizer
    with serve(settings=chat_web.Settings(tokenizer_info=True)) as server:
        for batch_size in (1, 7):
            samples, results = run("local-completions", "/v1/completions", ["our_mc", "our_gen"], batch_size=batch_size)
            correct = 0
            for row, responses, generated in zip(rows, samples["our_mc"], samples["our_gen"]):
                direct = []
                for choice, (response,) in zip(row["choices"], responses):
                    context, whole = tokenizer.encode(row["question"]), tokenizer.encode(f"{row['question']} {choice}")
                    with torch.no_grad():
                        logprobs = torch.log_softmax(engine.model(torch.tensor([whole]))[0], dim=-1)
                    places = range(len(context), len(whole))
                    direct.append(sum(logprobs[t - 1, whole[t]].item() for t in places))
                    assert response[0] == pytest.approx(direct[-1], abs=1e-4)
                    assert response[1] == all(logprobs[t - 1].argmax() == whole[t] for t in places)
                correct += max(range(3), key=direct.__getitem__) == row["answer"]
                assert generated == [[greedy(tokenizer.encode(row["question"]))]]
            assert results["our_mc"]["acc,none"] == pytest.approx(correct / len(rows))
            print(f"batch size {batch_size}: acc {correct / len(rows):.4f}, the same directly")
        samples, _ = run("local-chat-completions", "/v1/chat/completions", ["our_gen"], apply_chat_template=True)
        for row, generated in zip(rows, samples["our_gen"]):
            assert generated == [[greedy(tokenizer.render_prompt([{"role": "user", "content": row["question"]}]), is_chat=True)]]
        wait_until_idle(server)
