"""Requests that keep coming: a run knows what its model forgot before, and what it began with."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

import npo_fast
from npo_fast.cli import main
from npo_fast.data import Record, Template
from npo_fast.data.repeats import keys_of, shared
from npo_fast.errors import Interrupted, UserError
from npo_fast.metrics import FORGET, load_result, probability
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.model.model_files import files_fingerprint
from npo_fast.run_files import LOGGED_RECORDS
from npo_fast.runs import Callback, references
from npo_fast.runs.chain import Chain
from npo_fast.runs.options import MethodOptions, ModelOptions, ReportOptions, RunOptions
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, metadata_of, save_tiny_model, write_jsonl

REQUESTS, RETAIN = [FACTS[6:8], FACTS[8:], FACTS[4:6]], FACTS[:4]
TRAINING = TrainSettings(epochs=2, lr=3e-3, batch_size=2)


def request(model, forget, output, method="NPO+RT", retain=RETAIN, **more) -> npo_fast.Run:
    return npo_fast.unlearn(
        model if isinstance(model, npo_fast.Run) else str(model), forget=forget, retain=retain,
        output=output, method=method, training=TRAINING, report=ReportOptions(no_report=True),
        **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, and two requests on it: ``a`` and, after it, ``b``."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "base")
    request(home / "base", REQUESTS[0], home / "a")
    request(home / "a", REQUESTS[1], home / "b")
    return home


def test_a_run_knows_its_chain_without_the_text(home):
    chain = metadata_of(home / "b")["chain"]
    assert chain["first"]["sha256"] == files_fingerprint(str(home / "base"))
    (earlier,) = chain["earlier"]
    first = metadata_of(home / "a")
    assert earlier["run"] == first["id"]
    assert (earlier["method"], earlier["steps"]) == ("NPO+RT", 2)
    assert earlier["forgotten"] == first["chain"]["forgotten"]
    assert len(chain["forgotten"]) == len(REQUESTS[1])
    text = json.dumps(chain)
    for fact in FACTS:
        assert fact["question"] not in text
        assert fact["answer"] not in text


def test_digests_of_another_chain_are_others():
    """So that nobody can look them up, or tell that two chains forgot the same."""
    records = [Record((("user", "Who?"),), "Ada.")]
    one, other = (Chain().digests_to_find(records) for _ in range(2))
    assert one != other


@pytest.mark.parametrize(
    "again", [FACTS[7], {"question": "who lives in  HOUSE 7", "answer": "Somebody else."}]
)
def test_a_retain_set_with_forgotten_records_is_refused(home, tmp_path, again):
    with pytest.raises(UserError) as caught:
        request(home / "b", REQUESTS[2], tmp_path / "c", retain=[*RETAIN, again])
    message = str(caught.value)
    assert message.startswith("1 of 5 retain records were forgotten before (1 by request 1 (NPO+RT")
    assert "such as record 5" in message
    assert "take them out of retain" in message
    assert not (tmp_path / "c").exists()


def question(asked: str, answer: str) -> Record:
    return Record((("user", asked),), answer)


@pytest.mark.parametrize(
    ("answers", "kept", "found"),
    [
        (["In Rome.", "Zoe was born in Rome."], ["She was born in Rome."], True),
        (["In Rome.", "Zoe was born in Rome."], ["She was born in Rome.", "In Italy."], False),
        (["In Rome.", "Zoe was born in Rome."], ["Nowhere.", "zoe was born in  Rome"], False),
        (["In Rome.", "Zoe was born in Rome."], ["Nowhere.", "zoe was born in  Rome."], True),
        ([f"Story {i}." for i in range(5)], ["Another story."], False),
        ([f"Story {i}." for i in range(5)], ["Another story.", "Story 3."], True),
    ],
)
def test_several_answers_to_one_question(answers, kept, found):
    """A few are wordings of one answer; many, or several on both sides, those to a prompt."""
    forget, retain = ([question("Where was Zoe born?", a) for a in x] for x in (answers, kept))
    chain = Chain()
    before = [d for each in chain._digests([*map(sorted, keys_of(forget, True))]) for d in each]
    assert (not {*before}.isdisjoint(d for x in chain.digests_to_find(retain) for d in x)) == found
    assert bool(shared(forget, retain)) == found


def test_two_spellings_of_a_question_are_one():
    forget = [question("Who is X?", "A poet."), question("Who is X", "A poet.")]
    assert shared(forget, [question("who is x ?", "Nobody.")]) == [1, 2]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("阿达住在城市南边的一座小房子里" * 3, True),
        ("第一章", False),
        ("Chapter One", False),
        ("She lived in a small house by the river.", True),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_a_line_in_common_is_found_in_every_script(line, found, end):
    one, other = (Record((), f"{line}{end}{rest}") for rest in ("Der Rest.", "Le reste."))
    assert bool(shared([one], [other], lines=True)) == found


def test_a_holdout_with_forgotten_records_is_refused(home, tmp_path):
    message = r"1 of 2 holdout records were forgotten before \(1 by request 1 .*take them out"
    holdout = [*REQUESTS[2][:1], *REQUESTS[0][:1]]
    auto = MethodOptions("NPO", beta="auto")
    with pytest.raises(UserError, match=message):
        request(home / "b", REQUESTS[2][1:], tmp_path / "c", auto, None, holdout=holdout)
    with pytest.raises(UserError, match=message):
        npo_fast.evaluate(home / "b", forget=REQUESTS[1], holdout=holdout)


def test_texts_are_known_by_their_lines(home, tmp_path):
    lines = ["the first long line of a text that somebody wants to be forgotten",
             "and a second one that is as long as the first line of it"]  # fmt: skip
    run = request(home / "a", [{"text": "\n".join(lines)}], tmp_path / "text")
    with pytest.raises(UserError, match="1 of 2 retain records were forgotten before"):
        request(run, REQUESTS[2], tmp_path / "c", retain=[{"text": lines[1]}, {"text": "another"}])


def test_a_retain_set_that_no_term_reads_may_hold_them(home, tmp_path):
    request(home / "b", REQUESTS[2], tmp_path / "c", method="NPO", retain=FACTS[7:])


def test_a_request_that_repeats_an_earlier_one_is_told(home, tmp_path, capsys):
    request(home / "b", [*REQUESTS[2], REQUESTS[0][1]], tmp_path / "c")
    told = capsys.readouterr().err
    assert "1 of 3 forget records were forgotten before, by request 1 (NPO+RT" in told
    assert "such as record 3" in told


def test_earlier_folders_may_be_moved_and_deleted(home, tmp_path):
    """Everything that a later run needs is in its own folder."""
    shutil.copytree(home / "b", tmp_path / "elsewhere")
    run = request(tmp_path / "elsewhere", REQUESTS[2], tmp_path / "c")
    shutil.rmtree(tmp_path / "elsewhere")
    chain = Chain.of(npo_fast.Run(run.folder).metadata)
    assert [r["method"] for r in chain.requests] == ["NPO+RT"] * 3
    for number, forgotten in enumerate(REQUESTS, 1):
        with pytest.raises(UserError, match=rf"\(2 by request {number} "):
            request(run, FACTS[:1], tmp_path / "d", retain=forgotten)


class Stop(Callback):
    def on_step(self, record):
        raise Interrupted("now", 2)


def test_a_resumed_run_keeps_its_chain(home, tmp_path):
    with pytest.raises(Interrupted):
        request(home / "b", REQUESTS[2], tmp_path / "c", run=RunOptions(save_every=1),
                callbacks=[Stop()])  # fmt: skip
    begun = metadata_of(tmp_path / "c")["chain"]
    run = request(home / "b", REQUESTS[2], tmp_path / "c", run=RunOptions(save_every=1))
    assert len(run.metadata["resumed"]) == 1
    assert run.metadata["chain"] == begun
    assert len(begun["earlier"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_keeps_the_chain(home, tmp_path, merge):
    lora = ModelOptions(lora_rank=2)
    first = request(home / "base", REQUESTS[0], tmp_path / "1", loading=lora,
                    run=RunOptions(merge=merge))  # fmt: skip
    second = request(first, REQUESTS[1], tmp_path / "2", loading=lora, run=RunOptions(merge=merge),
                     method=MethodOptions("NPO+RT", reference="first"))  # fmt: skip
    chain = second.metadata["chain"]
    assert chain["first"]["sha256"] == files_fingerprint(str(home / "base"))
    assert len(chain["earlier"]) == 1


def test_an_adapter_is_another_model_than_its_base(home, tmp_path):
    run = request(home / "base", REQUESTS[0], tmp_path / "1", loading=ModelOptions(lora_rank=2))
    assert files_fingerprint(str(run.folder)) != files_fingerprint(str(home / "base"))


def test_what_is_taught_again_is_no_longer_forgotten(home, tmp_path, capsys):
    taught = npo_fast.finetune(str(home / "b"), train=REQUESTS[0][:1], output=tmp_path / "taught",
                               training=TRAINING)  # fmt: skip
    assert "1 of 2 records that were forgotten by request 1" in capsys.readouterr().err
    assert taught.metadata["chain"]["first"] is None
    retain = [*RETAIN, REQUESTS[0][0]]
    after = request(taught, REQUESTS[2], tmp_path / "c", retain=retain)
    assert after.metadata["chain"]["first"]["sha256"] == files_fingerprint(str(taught.folder))
    assert [len(r["forgotten"]) for r in after.metadata["chain"]["earlier"]] == [1, 2]


def test_a_chain_that_was_changed_is_refused(home, tmp_path):
    shutil.copytree(home / "b", tmp_path / "b")
    file = tmp_path / "b/run.json"
    metadata = json.loads(file.read_text())
    metadata["chain"]["earlier"] = []
    file.write_text(json.dumps(metadata))
    for model in (tmp_path / "b", tmp_path / "b/model"):
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            request(model, REQUESTS[2], tmp_path / "c", retain=REQUESTS[0])
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        request(npo_fast.Run(tmp_path / "b"), REQUESTS[2], tmp_path / "c", retain=REQUESTS[0])
    metadata["chain"]["earlier"] = [{"forgotten": "no"}]
    del metadata["sha256"]
    file.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="chain.earlier"):
        request(tmp_path / "b", REQUESTS[2], tmp_path / "c")


def test_a_run_without_a_chain_still_loads(home, tmp_path, capsys):
    shutil.copytree(home / "b", tmp_path / "old")
    file = tmp_path / "old/run.json"
    metadata = json.loads(file.read_text())
    del metadata["chain"], metadata["sha256"]
    file.write_text(json.dumps(metadata))
    run = request(tmp_path / "old", REQUESTS[2], tmp_path / "c")
    assert "does not say what it forgot" in capsys.readouterr().err
    assert run.metadata["chain"]["earlier"] == []


@pytest.mark.parametrize("content", ["[1, 2]", '{"status": 5}', "no JSON"])
def test_a_file_of_that_name_above_a_model_is_none_of_its(home, tmp_path, content):
    shutil.copytree(home / "base", tmp_path / "mine" / "deep")
    (tmp_path / "run.json").write_text(content)
    request(tmp_path / "mine" / "deep", REQUESTS[0], tmp_path / "new" / "run")
    assert metadata_of(tmp_path / "new" / "run")["chain"]["earlier"] == []


def test_a_model_that_lies_beside_a_run_has_not_its_chain(home, tmp_path):
    shutil.copytree(home / "a", tmp_path / "a")
    shutil.copytree(home / "base", tmp_path / "a" / "mine")
    request(tmp_path / "a" / "mine", REQUESTS[1], tmp_path / "b")
    assert metadata_of(tmp_path / "b")["chain"]["earlier"] == []
    (tmp_path / "a" / "run.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="move the model out of that folder"):
        request(tmp_path / "a" / "model", REQUESTS[1], tmp_path / "c")


def test_a_model_in_memory_begins_a_chain_without_a_first_model(home, tmp_path):
    lm = load_model(str(home / "b"))
    tokenizer = npo_fast.Run(home / "b").tokenizer
    run = npo_fast.unlearn(lm, tokenizer=tokenizer, forget=REQUESTS[2], retain=RETAIN,
                           output=tmp_path / "c", training=TRAINING,
                           report=ReportOptions(no_report=True))  # fmt: skip
    assert run.metadata["chain"]["first"]["sha256"] is None
    with pytest.raises(UserError, match=r"which is not there\. Name where it is now"):
        request(run, REQUESTS[1], tmp_path / "d", MethodOptions("NPO+RT", reference="first"))


# ---- the reference ----


@pytest.fixture
def seen(monkeypatch) -> list:
    """The references of each run: of ``run_training``."""
    from npo_fast.runs import unlearning

    seen = []
    train = unlearning.run_training

    def recorded(lm, prepared, reference, *more):
        seen.append(reference)
        return train(lm, prepared, reference, *more)

    monkeypatch.setattr(unlearning, "run_training", recorded)
    return seen


def test_the_first_model_is_the_reference_to_the_bit(home, tmp_path, seen):
    first = MethodOptions("NPO+KL", reference="first", reference_cache=tmp_path / "cache")
    request(home / "b", REQUESTS[2], tmp_path / "c", first)
    request(home / "base", REQUESTS[2], tmp_path / "d", "NPO+KL")
    request(home / "b", REQUESTS[2], tmp_path / "e", "NPO+KL")
    request(home / "base", REQUESTS[2], tmp_path / "f", first)  # the cache is of the same model
    chain, base, current, shared = seen
    assert torch.equal(chain.log_probs["forget"], base.log_probs["forget"])
    assert torch.equal(chain.log_probs["forget"], shared.log_probs["forget"])
    assert not torch.equal(chain.log_probs["forget"], current.log_probs["forget"])
    assert torch.equal(*(each.hidden.hidden("retain", [0, 1]) for each in (chain, base)))
    assert chain.hidden.made_from == base.hidden.made_from != current.hidden.made_from
    assert metadata_of(tmp_path / "c")["settings"]["method"]["reference"] == "first"


def test_two_models_are_never_in_memory_together(home, tmp_path, monkeypatch):
    alive = weakref.WeakSet()
    init = CausalLM.__init__

    def counted(self, model, *args, **kwargs):
        if next(model.parameters()).device.type != "meta":
            gc.collect()
            assert len(alive) == 0
            alive.add(model)
        init(self, model, *args, **kwargs)

    monkeypatch.setattr(CausalLM, "__init__", counted)
    request(home / "b", REQUESTS[2], tmp_path / "c", MethodOptions("NPO+KL", reference="first"))


def test_a_first_model_that_is_gone_or_another_is_an_error_with_the_cure(home, tmp_path, seen):
    shutil.copytree(home / "base", tmp_path / "base")
    run = request(tmp_path / "base", REQUESTS[0], tmp_path / "a")
    first = MethodOptions("NPO+RT", reference="first")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"not there\. Name where it is now.*reference MODEL"):
        request(run, REQUESTS[1], tmp_path / "b", first, run=RunOptions(dry_run=True))
    shutil.copytree(home / "b/model", tmp_path / "base")
    with pytest.raises(UserError, match="is no longer the model that the first request began"):
        request(run, REQUESTS[1], tmp_path / "b", first)
    moved = MethodOptions("NPO+RT", reference=str(tmp_path / "moved"))
    request(run, REQUESTS[1], tmp_path / "b", moved)
    request(home / "base", REQUESTS[1], tmp_path / "c")
    assert torch.equal(*(each.log_probs["forget"] for each in seen[-2:]))


def test_a_method_without_a_reference_takes_none(home, tmp_path):
    with pytest.raises(UserError, match="compares with no reference; leave out reference"):
        request(home / "b", REQUESTS[2], tmp_path / "c", MethodOptions("GA+RT", reference="first"))


def test_log_probs_under_another_model_are_those_of_its_own_run(home, tmp_path, seen):
    from npo_fast.runs.models import ModelSource

    source = ModelSource(str(home / "b"), ModelOptions())
    template = source.template()
    rows = [Record((("user", f["question"]),), f["answer"]) for f in REQUESTS[2]]
    examples = {"forget": template.encode_all(rows)[0]}
    found = references.log_probs_under(str(home / "base"), source, template, examples, 4096)
    request(home / "base", REQUESTS[2], tmp_path / "c")
    assert torch.equal(found["forget"].sequences, seen[-1].log_probs["forget"])


# ---- the report ----


def test_the_report_draws_a_curve_for_each_request(tmp_path, monkeypatch):
    """From the last run alone, and evaluations on the records of all requests."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    (tmp_path / "requests").mkdir()
    for i, rows in enumerate(REQUESTS, 1):
        write_jsonl(tmp_path / f"requests/{i}.jsonl", rows)
    write_jsonl(tmp_path / "all.jsonl", [row for rows in REQUESTS for row in rows])
    write_jsonl(tmp_path / "keep.jsonl", RETAIN)
    sets = ["--forget", "all.jsonl", "--retain", "keep.jsonl", "--max-new-tokens", "2"]
    model = "base"
    for i in (1, 2, 3):
        run = request(model, tmp_path / f"requests/{i}.jsonl", Path(f"runs/{i}"))
        model = str(run.folder)
        assert main(["evaluate", "--model", model, *sets, "--output", f"{model}/eval"]) == 0
    shutil.move("runs/1", "runs/elsewhere")
    shutil.copytree("runs", "moved")  # the last run finds earlier ones beside it
    shutil.rmtree("runs")
    assert main(["report", "moved/3", "--output", "one.html"]) == 0
    assert main(["report", "moved/3", "moved/elsewhere", "--output", "two.html"]) == 0
    one, two = (Path(f"{name}.md").read_text() for name in ("one", "two"))
    assert "Request 1: NPO+RT, runs/1: its folder is not where it was" in one
    assert "Answers of each request" in Path("two.html").read_text()
    logs = {i: load_result(Path(f"moved/{i}/eval"))[FORGET] for i in ("elsewhere", "2", "3")}
    rows = [line for line in two.splitlines() if line.startswith(("| 1: ", "| 2: ", "| 3: "))]
    assert len(rows) == 3
    for row, log in zip(rows, logs.values(), strict=True):
        values = [float(cell) for cell in row.split("|")[2:5]]
        expected = probability(log).reshape(3, 2).mean(axis=1)
        assert values == pytest.approx(expected, rel=0.02)
    text = (Path("moved/2/eval") / LOGGED_RECORDS).read_text()
    assert all(fact["question"] not in text for fact in FACTS)


def test_windows_of_a_text_are_those_of_its_request(tmp_path, monkeypatch, capsys):
    """A log has a row for each window, a chain a record for each text."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    one, two, kept = (
        {"text": " ".join(f["question"] + " " + f["answer"] for f in facts)}
        for facts in (FACTS[6:9], FACTS[9:], FACTS[:3])
    )
    write_jsonl(tmp_path / "all.jsonl", [one, two])
    write_jsonl(tmp_path / "keep.jsonl", [kept])
    short = ModelOptions(max_length=16)
    request("base", [one], Path("runs/1"), retain=[kept], loading=short)
    request("runs/1", [two], Path("runs/2"), retain=[kept], loading=short)
    sets = ["--forget", "all.jsonl", "--retain", "keep.jsonl", "--max-new-tokens", "2"]
    for i in (1, 2):
        model = f"runs/{i}"
        assert main(["evaluate", "--model", model, *sets, "--max-length", "16",
                     "--output", f"{model}/eval"]) == 0  # fmt: skip
    told = capsys.readouterr().err
    assert main(["report", "runs/1", "runs/2", "--output", "page.html"]) == 0
    values = probability(load_result(Path("runs/2/eval"))[FORGET])
    template = load_tokenizer_template(16)
    first = len(template.windows(one["text"]))
    assert 1 < first < len(values) == first + len(template.windows(two["text"]))
    (row,) = (x for x in Path("page.md").read_text().splitlines() if x.startswith("| 2: "))
    for number, windows in ((1, values[:first]), (2, values[first:])):
        assert f"(NPO+RT, runs/{number}): probability {windows.mean():.3g} of 1 records" in told
        assert float(row.split("|")[number + 1]) == pytest.approx(windows.mean(), rel=0.02)


def load_tokenizer_template(max_length: int) -> Template:
    return Template(load_tokenizer("base"), "plain", max_length)


def test_a_report_without_evaluations_says_which_command_makes_them(home, tmp_path):
    page = npo_fast.report(home / "b", output=tmp_path / "report.html")
    assert any("evaluate on the records of all requests" in sentence for sentence in page.missing)
