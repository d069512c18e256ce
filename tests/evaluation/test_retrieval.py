"""Retrieval: exact lengths, needles where they belong, scores equal to real decoding, figures by hand."""

import gzip
import itertools
import json
import math
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from yarn_tune.data.needles import DEMO, PLAIN, TASKS, Prompt, PromptSpec, Wording, answer_tokens, build_prompt
from yarn_tune.data.needles import prompt_of as task_prompt
from yarn_tune.errors import UserError
from yarn_tune.evaluation.retrieval import (
    Cell,
    Retrieval,
    RetrievalGrid,
    RetrievalRecord,
    load_records,
    retrieval_table,
    retrieve,
    save_records,
    score_server,
    score_transformers,
    wilson,
)
from yarn_tune.models.loading import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
CHAT = (
    "<|endoftext|>system\nBe brief.\n{% for message in messages %}{{ message['role'] + ': ' }}"
    "{{ message['content'] | trim }}<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = Wording(needle=" w1 {word} w2 {number} w3", question=" w4 {word} w5", lead="w1 {word} w2", words="w7 w8 w9")
PASSKEY = Wording(needle=" The pass key is {number}.", question=" What is it?", lead="The pass key is", words="key")


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """The demo's as it is, with a chat template, with a token that begins every text; one token a word."""
    demo, chat, opened = (load_tokenizer(str(ROOT / "data/tiny-base")) for _ in range(3))
    chat.chat_template = CHAT
    begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    opened.backend_tokenizer.post_processor = begin
    return {"demo": demo, "chat": chat, "opened": opened, "words": tiny_tokenizer()}


@cache
def prose(name: str) -> list[int]:
    """Token ids of a held-out document, or of different words in a row."""
    if name == "words":
        return [1 + i % (VOCABULARY - 1) for i in range(2000)]
    with gzip.open(ROOT / "data/sample/heldout.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"][:20000]
    ids: list[int] = tokenizers()["demo"](text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prompt_of(
    name: str = "demo", length: int = 300, depth: float = 0.5, keys: int = 1, seed: int = 0, wording: Wording = DEMO
) -> Prompt:
    return build_prompt(tokenizers()[name], prose(name), length, depth, keys, seed, wording)


@pytest.mark.parametrize("wording", [DEMO, PLAIN, WORDS], ids=["demo", "plain", "words"])
@pytest.mark.parametrize("name", ["demo", "chat", "opened", "words"])
def test_prompts_have_exactly_their_length(name, wording):
    for length in (200, 201, 255, 640):
        for seed in range(6):
            for keys in (1, 3):
                prompt = prompt_of(name, length, seed / 5, keys, seed, wording)
                assert len(prompt.ids) == length
                assert all(isinstance(token, int) for token in [*prompt.ids, *prompt.answer_ids])


def test_the_same_seed_gives_the_same_prompt_and_another_seed_another():
    prompts = [prompt_of(keys=2, seed=seed) for seed in range(20)]
    assert prompts == [prompt_of(keys=2, seed=seed) for seed in range(20)]
    assert len({tuple(prompt.ids) for prompt in prompts}) == 20
    assert len({prompt.answer for prompt in prompts}) == 20
    # Also in another process, on another day.
    assert prompts[0].answer == "26267"
    assert tokenizers()["demo"].decode(prompts[0].ids).endswith("The number of the kitchen is")


@pytest.mark.parametrize("keys", [1, 4])
@pytest.mark.parametrize("name", ["demo", "chat", "opened"])
def test_the_needle_stands_at_its_depth(name, keys):
    tokenizer = tokenizers()[name]
    for seed in range(8):
        ends = [prompt_of(name, depth=depth, keys=keys, seed=seed).needle_at for depth in (0.0, 1.0)]
        for depth in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
            prompt = prompt_of(name, depth=depth, keys=keys, seed=seed)
            text = tokenizer.decode(prompt.ids)
            asked = re.search(r"The number of the (\w+) is$", text)
            assert asked
            needle = f" The number of the {asked[1]} is {prompt.answer}. "
            assert tokenizer.decode(prompt.ids[prompt.needle_at :]).startswith(needle)
            assert text.count(needle) == 1
            stated = re.findall(r"The number of the (\w+) is (\d+)\.", text)
            assert len({word for word, _ in stated}) == len({number for _, number in stated}) == len(stated) == keys
            # A needle of about 16 tokens in the way moves it by half of that at most.
            wanted = ends[0] + depth * (ends[1] - ends[0])
            assert abs(prompt.needle_at - wanted) <= (0.5 if keys == 1 else 10)
        opening = {"demo": 0, "opened": 1, "chat": len(tokenizer(CHAT.split("{%")[0] + "user: ")["input_ids"])}[name]
        assert ends[0] == opening
        # At depth 1 only the question follows the needle.
        last = prompt_of(name, depth=1.0, keys=keys, seed=seed)
        after = tokenizer.decode(last.ids[last.needle_at :])
        assert re.match(r" The number of the (\w+) is \d+\.  What is the number of the \1\?", after)


def test_distractors_stand_at_different_places_on_both_sides():
    found = set()
    for seed in range(12):
        prompt = prompt_of(keys=4, seed=seed)
        text = tokenizers()["demo"].decode(prompt.ids)
        starts = [m.start() for m in re.finditer(r" The number of the \w+ is \d+\. ", text)]
        ends = [m.end() for m in re.finditer(r" The number of the \w+ is \d+\. ", text)]
        assert all(end < start for end, start in zip(ends, starts[1:], strict=False))  # prose between any two
        own = len(tokenizers()["demo"].decode(prompt.ids[: prompt.needle_at]))
        found.add(starts.index(own))
    assert found >= {1, 2}


def test_around_the_needles_is_prose_as_it_was():
    needle, question = 5, 3 + 3  # w1, word, w2, number (unknown to this tokenizer: 0), w3
    starts = set()
    for seed in range(8):
        prompt = prompt_of("words", 150, 0.4, 3, seed, WORDS)
        rest, at = [], 0
        while at < 150 - question:
            if prompt.ids[at] == 2 and prompt.ids[at + 2 : at + 5] == [3, 0, 4]:
                at += needle
            else:
                rest.append(prompt.ids[at])
                at += 1
        assert len(rest) == 150 - question - 3 * needle
        start = prose("words").index(rest[0])
        assert rest == prose("words")[start : start + len(rest)]
        starts.add(start)
    assert len(starts) > 4


@pytest.mark.parametrize("name", ["demo", "chat", "opened"])
def test_how_long_an_answer_is_needs_no_prompt(name):
    for wording, seed, keys in itertools.product((DEMO, PLAIN), range(4), (1, 3)):
        found = answer_tokens(
            tokenizers()[name], PromptSpec(length=1, depth=0.0, seed=seed, keys=keys, wording=wording)
        )
        assert found == len(prompt_of(name, seed=seed, wording=wording, keys=keys).answer_ids) > 0


def test_the_demo_wording_is_what_the_demo_model_read():
    """`number_sentences` of data/tiny-base/train.py, token for token."""
    encode = partial(tokenizers()["demo"], add_special_tokens=False)
    prompt = prompt_of(seed=1)
    word = tokenizers()["demo"].decode(prompt.ids).split()[-2]
    needle = encode(f" The number of the {word} is {prompt.answer}. ")["input_ids"]
    question = f" What is the number of the {word}? The number of the {word} is {prompt.answer}."
    assert prompt.ids[prompt.needle_at : prompt.needle_at + len(needle)] == needle
    asked = encode(question)["input_ids"][:-1]
    assert [*prompt.ids, *prompt.answer_ids][-len(asked) :] == asked
    assert tokenizers()["demo"].decode(prompt.answer_ids) == f" {prompt.answer}"


def test_a_chat_template_goes_around_prose_and_question():
    prompt = prompt_of("chat", wording=PLAIN)
    text = tokenizers()["chat"].decode(prompt.ids)
    pattern = (
        r"<\|endoftext\|>system\nBe brief\.\nuser: .* What is the special magic number for (\w+) mentioned in the text "
        r"above\?<\|endoftext\|>\nassistant: The special magic number for \1 is"
    )
    assert re.fullmatch(pattern, text, re.DOTALL)
    assert prompt.ids.count(0) == 2  # the special tokens of the template are tokens, not letters


def test_a_text_begins_as_the_tokenizer_begins_it():
    assert prompt_of("opened").ids[0] == 0
    assert prompt_of("opened").ids.count(0) == 1
    assert 0 not in prompt_of("demo").ids


def test_a_tokenizer_that_puts_a_blank_first_puts_none_inside():
    """SentencePiece as in Llama 2: needle and question are encoded as they would be in the middle of a text."""
    letters = {c: i for i, c in enumerate(["▁", "\n", *map(chr, range(33, 127)), "\n\n"])}
    tokenizer = Tokenizer(models.BPE(letters, [("\n", "\n")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blank = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert blank(" is")["input_ids"][:2] == [0, 0]
    prompt = build_prompt(blank, [letters["x"]] * 400, 300, 0.0, 1, 0)
    symbols = blank.convert_ids_to_tokens(prompt.ids)
    assert "".join(symbols).startswith("▁The▁special")
    assert re.search(r"x▁What▁is▁the.*above\?▁The▁special▁magic▁number▁for▁[a-z]+▁is$", "".join(symbols))
    assert blank.convert_ids_to_tokens(prompt.answer_ids) == ["▁", *prompt.answer]
    # Line breaks that would grow together with the one it is tried behind.
    blank.chat_template = "\n{{ messages[0]['content'] }}\n"
    wrapped = build_prompt(blank, [letters["x"]] * 400, 300, 0.0, 1, 0)
    assert "".join(blank.convert_ids_to_tokens(wrapped.ids)).startswith("▁\n▁The▁special")


def solved(task: str, text: str) -> str:
    """The answer to a prompt of a task, found in its text alone."""
    if task == "values":
        word = re.search(r"Which numbers does the text above give for (\w+), in order", text)[1]
        return ", ".join(re.findall(rf"number (?:of the|for) {word} is (\d+)\.", text))
    if task == "variables":
        value = re.search(r"Which variables have the value (\d+) in the text", text)[1]
        names: list[str] = []
        for name, given in re.findall(r" VAR (\w+) = (?:VAR )?(\w+)\.", text):
            names += [name] if given == value or given in names else []
        return " ".join(names)
    calls = Counter(re.findall(r" The bell rang for (\w+)\.", text))
    (first, most), (_, second) = calls.most_common(2)
    assert (most, second, calls.total()) == (8, 3, 17)
    return first


@pytest.mark.parametrize("wording", [DEMO, PLAIN], ids=["demo", "plain"])
@pytest.mark.parametrize("name", ["demo", "chat", "opened"])
@pytest.mark.parametrize("task", list(TASKS))
def test_every_tasks_prompt_has_its_length_and_the_answer_that_its_text_gives(task, name, wording):
    tokenizer, answers = tokenizers()[name], set()
    for seed in range(6):
        spec = PromptSpec(task=task, length=500 + seed, depth=seed / 5, seed=seed, wording=wording)
        prompt = task_prompt(tokenizer, prose(name), spec)
        assert len(prompt.ids) == 500 + seed
        assert len(prompt.answer_ids) == answer_tokens(tokenizer, spec)
        text = tokenizer.decode(prompt.ids)
        assert solved(task, text) == prompt.answer
        assert tokenizer.decode(prompt.answer_ids) == f" {prompt.answer}"
        assert prompt == task_prompt(tokenizer, prose(name), spec)
        answers.add(prompt.answer)
    assert len(answers) > (1 if task == "words" else 5)


@pytest.mark.parametrize("task", ["values", "variables"])
def test_the_first_statement_of_a_task_is_at_its_depth(task):
    ends = []
    for depth in (0.0, 0.5, 1.0):
        spec = PromptSpec(task=task, length=600, depth=depth, seed=3, wording=DEMO)
        prompt = task_prompt(tokenizers()["demo"], prose("demo"), spec)
        after = tokenizers()["demo"].decode(prompt.ids[prompt.needle_at :])
        first = prompt.answer[:4] if task == "variables" else prompt.answer.split(",")[0]
        assert re.match(
            rf" VAR {first} = \d+\." if task == "variables" else rf" The number of the \w+ is {first}\.", after
        )
        ends.append(prompt.needle_at / 600)
    assert ends[0] < 0.2
    assert ends[0] < ends[1] < ends[2]
    assert ends[2] > 0.6


def test_tasks_are_asked_one_after_another_and_counted_apart():
    grid = RetrievalGrid([400], [0.0, 1.0], 2, wording=DEMO, tasks=("needle", "values", "words"))
    found = retrieve(lambda prompt: "," in prompt.answer, tokenizers()["demo"], prose("demo"), grid, progress=None)
    assert [(cell.task, cell.right, cell.asked) for cell in found.cells] == [
        (task, 2 * (task == "values"), 2) for task in ("needle", "values", "words") for _ in range(2)
    ]
    assert {task: one.accuracy()[0] for task, one in found.by_task().items()} == {"needle": 0, "values": 1, "words": 0}
    assert found.accuracy()[0] == pytest.approx(1 / 3)
    assert found.shares()[2] == [[pytest.approx(1 / 3)], [pytest.approx(1 / 3)]]
    assert retrieval_table(found).count("| mean |") == 3
    with pytest.raises(UserError, match="retrieval tasks: of needle, values, variables, words; found riddles"):
        RetrievalGrid([400], [0.0], 1, tasks=("needle", "riddles"))


@pytest.mark.parametrize("task", list(TASKS))
def test_a_length_without_room_for_a_task_is_refused_with_the_smallest_possible(task):
    spec = PromptSpec(task=task, length=20, depth=0.0, seed=0)
    with pytest.raises(UserError, match="smallest length possible") as refused:
        task_prompt(tokenizers()["demo"], prose("demo"), spec)
    smallest = int(re.findall(r"\d+", str(refused.value))[-1])
    assert len(task_prompt(tokenizers()["demo"], prose("demo"), replace(spec, length=smallest)).ids) == smallest


@pytest.mark.parametrize(("name", "keys"), [("demo", 1), ("demo", 5), ("chat", 2), ("opened", 1), ("words", 3)])
def test_a_length_without_room_is_refused_with_the_smallest_possible(name, keys):
    wording = WORDS if name == "words" else DEMO
    with pytest.raises(UserError, match="smallest length possible") as refused:
        prompt_of(name, 5, 0.5, keys, 0, wording)
    smallest = int(re.findall(r"\d+", str(refused.value))[-1])
    assert len(prompt_of(name, smallest, 0.5, keys, 0, wording).ids) == smallest
    with pytest.raises(UserError, match=f"possible .* is {smallest}$"):
        prompt_of(name, smallest - 1, 0.5, keys, 0, wording)


def test_impossible_prompts_are_refused():
    with pytest.raises(UserError, match="40 tokens of prose, 2"):
        build_prompt(tokenizers()["demo"], prose("demo")[:40], 300, 0.5, 1, 0, DEMO)
    for keys in (0, 15):
        with pytest.raises(UserError, match=f"between 1 and 14 .* found {keys}"):
            prompt_of(keys=keys)
    for depth in (-0.1, 1.1, 50):
        with pytest.raises(UserError, match=f"found {depth}"):
            prompt_of(depth=depth)
    prompt_of(wording=PASSKEY)
    with pytest.raises(UserError, match="between 1 and 1 "):  # two pass keys could not be told apart
        prompt_of(keys=2, wording=replace(PASSKEY, words="one two"))
    deaf = load_tokenizer(str(ROOT / "data/tiny-base"))
    deaf.chat_template = "hello"
    with pytest.raises(UserError, match="0 times"):
        build_prompt(deaf, prose("demo"), 300, 0.5, 1, 0, DEMO)


@pytest.mark.parametrize("family", ["llama", "cohere", "granite", "gpt_neox"])
def test_the_score_is_that_of_real_greedy_decoding(family):
    model = tiny_model(family)
    outcomes = []
    for seed in range(24):
        prompt = prompt_of("words", 40 + seed, seed / 23, 1 + seed % 3, seed, WORDS)
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
            )
        decoded = new[0, len(prompt.ids) :].tolist()
        assert len(decoded) == 5
        answer = list(decoded)
        if seed % 2:  # one token of it, the first to the last, is another
            answer[seed // 2 % 5] = (answer[seed // 2 % 5] + 1) % VOCABULARY
        found = score_transformers(model, replace(prompt, answer_ids=answer))
        assert found == (decoded == answer)
        assert score_transformers(model, prompt) == (decoded[: len(prompt.answer_ids)] == prompt.answer_ids)
        outcomes.append(found)
    assert outcomes.count(True) == outcomes.count(False) == 12


def test_logits_exist_at_the_answer_only():
    model = tiny_model()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: seen.append(tuple(out.shape)))
    score_transformers(model, replace(prompt_of("words", 150, wording=WORDS), answer_ids=[5, 6, 7]))
    assert seen == [(3, VOCABULARY)]


def test_the_demo_model_retrieves_inside_its_window_only():
    """The 88% of data/tiny-base/README.md is of rows with one or two numbers; with one number it is higher."""
    model = load_model(str(ROOT / "data/tiny-base"), dtype="float32")
    score = partial(score_transformers, model)
    grid = RetrievalGrid([250, 512], [0.0, 0.5, 1.0], 6, wording=DEMO)
    found = retrieve(score, tokenizers()["demo"], prose("demo"), grid, progress=None)
    inside, beyond = found.accuracy(250), found.accuracy(beyond=256)
    assert inside[0] >= 0.85
    assert beyond[0] <= 0.15


class Server(HTTPServer):
    """A test server with the API of OpenAI: returns `reply` and keeps the requests."""

    status, reply = 200, b""
    asked: list[tuple[str, dict[str, object]]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    stand_in = Server(("127.0.0.1", 0), Handler)
    stand_in.asked = []
    thread = threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()
    thread.join()


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": "length"}]}).encode()


def test_a_server_is_asked_in_tokens_and_its_text_compared(server):
    prompt = prompt_of()
    url = f"http://127.0.0.1:{server.server_port}"
    wrong = str(int(prompt.answer) - 1)
    cases = {f" {prompt.answer}": True, prompt.answer: True, f" {wrong}": False, f" {prompt.answer[:4]}.": False}
    for text, right in cases.items():
        server.reply = completion(text)
        assert score_server(url, "the-model", prompt) is right
    assert score_server(f"{url}/v1/", "the-model", prompt) is False
    expected = {"model": "the-model", "prompt": prompt.ids, "max_tokens": len(prompt.answer_ids), "temperature": 0}
    assert server.asked == [("/v1/completions", expected)] * 5


def test_what_a_server_refuses_is_passed_on(server):
    url = f"http://127.0.0.1:{server.server_port}"
    server.status, server.reply = 404, b'{"message": "The model `x` does not exist."}'
    with pytest.raises(UserError, match=r"/v1/completions.*404.*does not exist.*'x' served.*300 tokens"):
        score_server(url, "x", prompt_of())


@pytest.mark.parametrize("reply", [b"<html>", b"{}", b'{"choices": []}', b"[]", b'{"choices": null}'])
def test_an_answer_that_is_no_completion_is_the_users_error(server, reply):
    server.reply = reply
    with pytest.raises(UserError, match="no completion came back"):
        score_server(f"http://127.0.0.1:{server.server_port}", "x", prompt_of())


def test_a_server_that_is_not_there_is_the_users_error(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", f"127.0.0.1:{port}"):
        with pytest.raises(UserError, match=rf"^{url}/v1/completions: .*vllm serve CHECKPOINT"):
            score_server(url, "x", prompt_of())


def test_wilson_intervals_by_hand():
    # 8 of 10, z^2 = 3.841459: centre (0.8 + 0.192073) / 1.384146, half sqrt(0.061463 + 0.036892) / 1.384146
    assert wilson(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=2e-6)
    # None of n: from 0 to z^2 / (n + z^2); all of n: the mirror image.
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((1.0, 10 / 13.841459, 1.0), abs=1e-6)
    # Half of 100: 0.5 -+ z / (2 sqrt(n + z^2))
    half = 1.959964 / (2 * math.sqrt(103.841459))
    assert wilson(50, 100) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-6)
    share, low, high = wilson(0, 0)
    assert math.isnan(share)
    assert (low, high) == (0.0, 1.0)


def asks(lengths: list[int], depths: list[float], per_cell: int, seed: int = 7) -> list[tuple[int, float, int]]:
    return [
        (spec.length, spec.depth, spec.seed) for spec in RetrievalGrid(lengths, depths, per_cell, 2, DEMO, seed).specs()
    ]


def test_a_grid_asks_every_cell_and_no_cell_depends_on_another():
    found = asks([256, 128], [1, 0.0], 3)
    assert [ask[:2] for ask in found] == [(n, d) for n in (128, 256) for d in (0.0, 1.0) for _ in range(3)]
    assert len({seed for *_, seed in found}) == 12
    assert asks([256], [1.0], 3) == [ask for ask in found if ask[:2] == (256, 1.0)]
    assert asks([256, 128], [1.0, 0.0], 2) == [ask for i, ask in enumerate(found) if i % 3 < 2]
    assert {s for *_, s in asks([128], [0.0], 3, seed=8)}.isdisjoint(s for *_, s in found)
    for lengths, depths, per_cell in (([], [0.5], 1), ([128], [], 1), ([128], [0.5], 0)):
        with pytest.raises(UserError, match="at least"):
            RetrievalGrid(lengths, depths, per_cell)


def short_sighted(prompt: Prompt) -> bool:
    """A score function that is right where the needle is in the last 200 tokens and its number is odd."""
    return len(prompt.ids) - prompt.needle_at <= 200 and int(prompt.answer) % 2 == 1


def test_retrieval_counts_what_was_scored(capsys):
    seen: list[Prompt] = []

    def score(prompt: Prompt) -> bool:
        seen.append(prompt)
        return short_sighted(prompt)

    tokenizer, grid = tokenizers()["demo"], RetrievalGrid([400, 150], [0.0, 1.0], 10, keys=2, wording=DEMO)
    found = retrieve(score, tokenizer, prose("demo"), grid, progress=None)
    assert capsys.readouterr().err == ""
    expected = [(n, d, 2, s) for n, d, s in asks([150, 400], [0, 1], 10, seed=0)]
    assert seen == [build_prompt(tokenizer, prose("demo"), *ask, DEMO) for ask in expected]
    odd = [sum(int(p.answer) % 2 for p in seen[i : i + 10]) for i in range(0, 40, 10)]
    assert found.cells == [
        Cell(150, 0.0, odd[0], 10), Cell(150, 1.0, odd[1], 10), Cell(400, 0.0, 0, 10), Cell(400, 1.0, odd[3], 10)
    ]  # fmt: skip
    assert all(0 < count < 10 for count in odd)


CELLS = [
    Cell(128, 0.0, 10, 10),
    Cell(128, 0.5, 8, 10),
    Cell(512, 0.0, 0, 10),
    Cell(512, 0.5, 3, 10),
    Cell(1024, 0.0, 0, 10),
    Cell(1024, 0.5, 1, 10),
]


def test_accuracy_of_a_length_of_all_and_beyond():
    found = Retrieval(CELLS)
    assert found.accuracy() == wilson(22, 60)
    assert found.accuracy(128) == wilson(18, 20)
    assert found.accuracy(beyond=128) == wilson(4, 40)
    assert found.accuracy(beyond=127) == wilson(22, 60)
    assert found.accuracy(512, beyond=128) == wilson(3, 20)
    assert math.isnan(found.accuracy(beyond=1024)[0])
    assert (found.prompts(), found.prompts(beyond=128)) == (60, 40)


def test_records_are_read_as_they_were_written_and_a_torn_file_as_none(tmp_path):
    path, records = tmp_path / "retrieval.json", {"yarn": RetrievalRecord("abc", Retrieval(CELLS))}
    save_records(path, records)
    assert load_records(path) == records
    path.write_text(path.read_text()[:100])
    assert load_records(path) == {}
    assert load_records(tmp_path / "missing.json") == {}


def test_the_table_has_rows_of_depth_and_the_mean_with_its_interval():
    found = Retrieval(CELLS)
    assert retrieval_table(found).split("\n") == [
        "| depth | 128 | 512 | 1024 |",
        "| --- | --- | --- | --- |",
        "| 0% | 100% | 0% | 0% |",
        "| 50% | 80% | 30% | 10% |",
        "| mean | 90% (70-97) | 15% (5-36) | 5% (1-24) |",
    ]
