"""The library's front door: the functions behind every subcommand, and what they return."""

import io
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

import npo_fast
from npo_fast import tables
from npo_fast.cli import main
from npo_fast.errors import UserError
from npo_fast.methods import NPO, Term
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.runs.hub import write_card
from npo_fast.runs.options import EvaluationOptions, MethodOptions, ReportOptions, RunOptions
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, read_jsonl, save_tiny_model, write_jsonl

FORGET, RETAIN = FACTS[6:], FACTS[:6]
TRAINING = TrainSettings(epochs=3, lr=3e-3, batch_size=2)
QUIET = ReportOptions(no_report=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("home") / "base")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> npo_fast.Run:
    output = tmp_path_factory.mktemp("runs") / "npo"
    return npo_fast.unlearn(
        str(base), forget=FORGET, retain=RETAIN, output=output, training=TRAINING,
        report=ReportOptions(report_records=2, max_new_tokens=4),
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def losses(run: npo_fast.Run) -> list[float]:
    return [record["loss"] for record in run.records]


def assert_same_weights(ours: dict, theirs: dict) -> None:
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_unlearn_gives_what_the_command_gives(base, run, tmp_path):
    """In ten lines of Python, and as one command."""
    forget = write_jsonl(tmp_path / "forget.jsonl", FORGET)
    retain = write_jsonl(tmp_path / "retain.jsonl", RETAIN)
    assert main(["unlearn", "--model", str(base), "--forget", str(forget), "--retain", str(retain),
                 "--output", str(tmp_path / "run"), "--epochs", "3", "--lr", "3e-3",
                 "--batch-size", "2", "--no-report"]) == 0  # fmt: skip
    assert [line["loss"] for line in read_jsonl(tmp_path / "run/steps.jsonl")] == losses(run)
    assert_same_weights(weights(tmp_path / "run"), weights(run.folder))


@pytest.mark.slow
def test_rows_files_and_datasets_are_the_same_data(base, run, tmp_path):
    rows = npo_fast.unlearn(
        str(base), forget=datasets.Dataset.from_list(FORGET),
        retain=write_jsonl(tmp_path / "retain.jsonl", RETAIN), output=tmp_path / "run",
        training=TRAINING, report=QUIET,
    )  # fmt: skip
    assert rows.metadata["data"] == run.metadata["data"]
    assert losses(rows) == losses(run)
    with pytest.raises(UserError, match='forget, record 2: the key "answer" is missing'):
        npo_fast.unlearn(str(base), forget=[FACTS[0], {"question": "Who?"}], method="NPO",
                         output=tmp_path / "no")  # fmt: skip
    with pytest.raises(UserError, match="forget holds no record"):
        npo_fast.unlearn(str(base), forget=[], method="NPO", output=tmp_path / "no")


def test_a_run_loads_again_from_its_folder(run):
    again = npo_fast.Run(run.folder)
    assert again.records == run.records
    assert again.settings["training"]["lr"] == 3e-3
    assert again.scores["forget"]["probability"] == run.scores["forget"]["probability"]
    assert_same_weights(again.model.state_dict(), run.model.state_dict())
    assert again.tokenizer.eos_token == run.tokenizer.eos_token
    with pytest.raises(UserError, match="is not a run folder"):
        npo_fast.Run(run.folder.parent)


@pytest.mark.slow
def test_a_model_in_memory_is_trained_in_place(base, run, tmp_path):
    model = load_model(str(base)).model
    trained = npo_fast.unlearn(
        model, forget=FORGET, retain=RETAIN, output=tmp_path / "run", training=TRAINING,
        tokenizer=load_tokenizer(str(base)), report=QUIET,
    )  # fmt: skip
    assert losses(trained) == losses(run)
    assert_same_weights(model.state_dict(), weights(run.folder))


@pytest.mark.slow
def test_terms_of_ones_own_are_a_method(base, run, tmp_path):
    terms = (Term("mine", "forget", NPO(0.1), "mean"),)
    mine = npo_fast.unlearn(str(base), forget=FORGET, method=terms, output=tmp_path / "mine",
                            training=TRAINING, report=QUIET)  # fmt: skip
    theirs = npo_fast.unlearn(str(base), forget=FORGET, method=MethodOptions("NPO", beta=0.1),
                              output=tmp_path / "npo", training=TRAINING,
                              report=QUIET)  # fmt: skip
    assert losses(mine) == losses(theirs)
    assert mine.settings["method"]["method"] == "mine"


def test_other_terms_do_not_go_on_with_a_run(base, tmp_path):
    def call(beta: float, callbacks=()):
        return npo_fast.unlearn(
            str(base), forget=FORGET, method=(Term("mine", "forget", NPO(beta), "mean"),),
            output=tmp_path / "run", training=TRAINING, report=QUIET,
            run=RunOptions(save_every=1), callbacks=callbacks,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="mine"):
        call(0.1, [Failing()])
    with pytest.raises(UserError, match="unfinished run that differs: terms is"):
        call(0.9)
    assert call(0.1).metadata["status"] == "finished"


def test_a_model_comes_back_as_transformers_has_it(base, run):
    """With its own attention: packs are not for ``generate``, nor are two rows at a time."""
    model = load_model(str(base)).model
    npo_fast.evaluate(model, forget=FORGET[:1], tokenizer=load_tokenizer(str(base)),
                      evaluation=npo_fast.EvaluationSettings(max_new_tokens=1))  # fmt: skip
    for each in (model, run.model, npo_fast.Run(run.folder).model):
        assert each(torch.tensor([[3, 4, 5], [6, 7, 8]])).logits.shape[:2] == (2, 3)
        assert not each.training


def test_a_changed_model_in_memory_does_not_begin_again_unnoticed(base, tmp_path):
    model = load_model(str(base)).model
    settings = {"forget": FORGET, "method": "NPO", "output": tmp_path / "run", "report": QUIET,
                "training": TRAINING, "tokenizer": load_tokenizer(str(base))}  # fmt: skip

    class Killed(npo_fast.Callback):
        def on_step(self, record) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        npo_fast.unlearn(model, **settings, callbacks=[Killed()])
    with pytest.raises(UserError, match="may have changed the model in memory"):
        npo_fast.unlearn(model, **settings)


def test_rows_may_come_from_a_generator(base, tmp_path):
    run = npo_fast.unlearn(
        str(base), forget=(row for row in FORGET), method="NPO", output=tmp_path / "run",
        training=TRAINING, report=ReportOptions(no_report=True, max_new_tokens=1),
        evaluation=EvaluationOptions(eval_every=6, eval_records=1),
    )  # fmt: skip
    assert run.metadata["data"]["forget"]["examples"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: TrainSettings(optimizer="adam"), "optimizer must be 'adamw' or 'adamw-8bit' or"),
        (lambda: TrainSettings(epochs=1.5), "epochs must be int, got 1.5"),
        (lambda: TrainSettings(lr="1e-5"), "lr must be float, got '1e-5'"),
        (lambda: npo_fast.ModelOptions(quantize="8bit"), "quantize must be 'none' or '4bit'"),
        (lambda: MethodOptions(beta="x"), "beta must be 'auto' or float, got 'x'"),
    ],
)
def test_an_option_of_another_type_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        options()


class Rows:
    """As a data frame: iterating gives the names of the columns."""

    def __iter__(self):
        return iter(["question", "answer"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget": 5}, "forget must be a file, a split or rows .*, got int"),
        ({"forget": Rows()}, "forget must be a file, a split or rows .*, got Rows"),
        ({"forget": FACTS[0]}, "forget must be a file, a split or rows .*, got dict"),
        ({"retain": 5}, "retain must be a file, a split or rows .*, got int"),
        ({"data": 5}, "data must be str or Path or None, got 5"),
        ({"idk": 5}, "idk must be str or Path or None, got 5"),
        ({"output": 5}, "output must be str or Path or None, got 5"),
        ({"training": {"lr": 1}}, "training must be TrainSettings, got {'lr': 1}"),
        ({"callbacks": Rows}, "callbacks must be Callback objects, got <class"),
        ({"callbacks": [print]}, "callbacks must be Callback objects, got "),
        ({"model": 5}, "model must be a name, a folder, a run or a causal language model, got 5"),
        ({"method": 5}, "method must be a name, MethodOptions or terms, got 5"),
    ],
)
def test_an_argument_of_a_wild_type_is_named(tmp_path, arguments, message):
    usual = {"model": "none", "forget": FORGET, "method": "NPO", "output": tmp_path / "run"}
    arguments = {**usual, **arguments}
    with pytest.raises(UserError, match=message):
        npo_fast.unlearn(arguments.pop("model"), **arguments)


def test_an_option_outside_of_its_group_is_told_where_it_belongs(base):
    for keywords, cure in (
        ({"lr": 1e-5}, r"training=TrainSettings\(lr="),
        ({"beta": 0.2}, r"method=MethodOptions\(beta="),
        ({"retan": []}, "did you mean retain"),
    ):
        with pytest.raises(UserError, match=f"unlearn has no {next(iter(keywords))}.*{cure}"):
            npo_fast.unlearn(str(base), forget=FORGET, **keywords)


def test_the_other_functions_name_wild_arguments_too(tmp_path):
    for call, message in (
        (lambda: npo_fast.finetune("none", train=5), "train must be a file, a split or rows"),
        (lambda: npo_fast.evaluate("none", holdout=5, forget=FORGET), "holdout must be a file"),
        (lambda: npo_fast.evaluate(log=5), "log must be a file, a folder, a run, scores or logs"),
        (lambda: npo_fast.attack("none", forget=FACTS[0]), "forget must be a file, a split"),
        (lambda: npo_fast.report(tmp_path, answers="5"), "answers must be int, got '5'"),
        (lambda: npo_fast.report([5]), "runs must be runs or their folders, got 5"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_message_names_settings_as_its_caller_does(base, tmp_path, capsys):
    """Keywords to a caller from Python, flags to a user of the command line."""
    mistake = (
        "NPO+RT keeps what {0} names; name it, take the model's own answers ({0} auto), or use NPO"
    )
    with pytest.raises(UserError) as caught:
        npo_fast.unlearn(str(base), forget=FORGET, output=tmp_path / "run")
    assert str(caught.value) == mistake.format("retain")
    assert main(["unlearn", "--model", str(base), "--forget", "f", "--output", "none"]) == 2
    assert mistake.format("--retain") in capsys.readouterr().err
    error = UserError("write `npo-fast report --answers 5`, or (--max-length) in runs/a--b")
    assert str(error) == "write `npo-fast report --answers 5`, or (max_length) in runs/a--b"


class Failing(npo_fast.Callback):
    def __init__(self) -> None:
        self.ended = 0

    def on_step(self, record):
        if record.step == 4 or record.steps < 4:
            raise RuntimeError("mine")

    def on_end(self):
        self.ended += 1


class Listener(npo_fast.Callback):
    def __init__(self) -> None:
        self.steps, self.evaluations, self.checkpoints, self.ended = [], [], [], 0

    def on_step(self, record):
        self.steps.append(record.step)
        if record.step == 4:
            self.should_stop = "heard enough"

    def on_evaluation(self, scores):
        self.evaluations.append(scores["step"])

    def on_checkpoint(self, path):
        self.checkpoints.append(path.name)

    def on_end(self):
        self.ended += 1


def test_a_callback_hears_of_everything_and_can_stop_the_run(base, tmp_path):
    listener = Listener()
    run = npo_fast.unlearn(
        str(base), forget=FORGET, retain=RETAIN, output=tmp_path / "run", training=TRAINING,
        report=ReportOptions(no_report=True, max_new_tokens=2), run=RunOptions(save_every=3),
        evaluation=EvaluationOptions(eval_every=2, eval_records=1), callbacks=[listener],
    )  # fmt: skip
    assert listener.steps == [1, 2, 3, 4] == [record["step"] for record in run.records]
    assert listener.evaluations == [0, 2, 4] == [each["step"] for each in run.evaluations]
    assert listener.checkpoints == ["step-000003"]
    assert listener.ended == 1
    assert run.metadata["status"] == "finished"
    assert run.metadata["final"]["step"] == 4
    card = (run.folder / "model/README.md").read_text()
    probability = run.evaluations[-1]["forget"]["probability"]
    assert f"| forget probability | {tables.number(probability)} |" in card
    assert (run.folder / "model/model.safetensors").exists()


def test_a_callback_that_fails_leaves_a_run_that_goes_on(base, run, tmp_path):
    failing = Failing()
    settings = {
        "forget": FORGET, "retain": RETAIN, "output": tmp_path / "run", "training": TRAINING,
        "report": QUIET, "run": RunOptions(save_every=3),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="mine"):
        npo_fast.unlearn(str(base), **settings, callbacks=[failing])
    assert failing.ended == 1
    resumed = npo_fast.unlearn(str(base), **settings)
    assert resumed.metadata["resumed"][0]["step"] == 4  # no step is lost, --save-every or not
    assert losses(resumed) == losses(run)


@pytest.mark.slow
def test_the_report_names_no_command_that_would_need_rows(run, tmp_path):
    report = npo_fast.report(run, output=tmp_path / "page.html")
    assert "(rows)" not in " ".join(report.missing)
    logs = str(run.folder / "eval")
    call = f"npo_fast.evaluate({str(run.folder)!r}, forget=ROWS, retain=ROWS, output={logs!r})"
    assert any(call in sentence for sentence in report.missing)


@pytest.mark.slow
def test_evaluate_attack_and_report_take_runs(run, base, tmp_path):
    settings = npo_fast.EvaluationSettings(max_new_tokens=2)
    scores = npo_fast.evaluate(run, forget=FORGET, retain=RETAIN, evaluation=settings,
                               output=tmp_path / "eval")  # fmt: skip
    assert scores == npo_fast.evaluate(log=tmp_path / "eval")
    assert len(scores.logs["eval_log_forget.json"]["avg_gt_loss"]) == 4
    attacked = npo_fast.attack(run, forget=FORGET, output=tmp_path / "attack", training=TRAINING)
    assert list(attacked) == ["before", "relearn", "int8", "int4"]
    report = npo_fast.report([run, run.folder.parent / "npo/../npo"][:1],
                             output=tmp_path / "page.html")  # fmt: skip
    assert report.rows[0]["method"] == "NPO+RT"
    assert (tmp_path / "page.md").exists()


def test_an_attack_refuses_how_to_relearn_before_it_measures(run, tmp_path):
    keeping = TrainSettings(epochs=1, keep_utility=0.9)
    with pytest.raises(UserError, match="weighs a retain term"):
        npo_fast.attack(run, forget=FORGET, output=tmp_path / "attack", training=keeping)
    assert not (tmp_path / "attack").exists()


def test_a_dry_run_loads_no_weight_and_writes_nothing(base, tmp_path):
    planned = npo_fast.unlearn(
        str(base), forget=FORGET, retain=RETAIN, output=tmp_path / "run", training=TRAINING,
        run=RunOptions(dry_run=True),
    )  # fmt: skip
    assert planned.metadata["steps"] == 6
    assert not (tmp_path / "run").exists()


def test_the_model_card_says_how_and_tells_no_record(run):
    card = (run.folder / "model/README.md").read_text()
    assert "library_name: transformers" in card
    assert "forget 4 records with NPO+RT" in card
    assert run.metadata["data"]["forget"]["sha256"] in card
    assert "| forget | probability |" in card
    assert not any(fact["answer"] in card or fact["question"] in card for fact in FACTS)
    assert str(run.folder.parent) not in card


def test_every_step_reaches_the_tracker(base, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    run = npo_fast.unlearn(
        str(base), forget=FORGET, retain=RETAIN, output=tmp_path / "run", training=TRAINING,
        report=ReportOptions(no_report=True, max_new_tokens=2),
        evaluation=EvaluationOptions(eval_every=3, eval_records=1),
        run=RunOptions(track="tensorboard"),
    )  # fmt: skip
    events = event_accumulator.EventAccumulator(str(run.folder / "tensorboard/run"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("terms/NPO")}
    assert logged == pytest.approx({r["step"]: r["terms"]["NPO"] for r in run.records})
    evaluated = [event.step for event in events.Scalars("evaluation/forget/probability")]
    assert evaluated == [0, 3, 6]


def test_a_tracker_that_is_not_installed_is_named_before_the_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr("npo_fast.runs.callbacks.find_spec", lambda name: None)
    with pytest.raises(UserError, match="track wandb needs accelerate: pip install accelerate"):
        npo_fast.unlearn(str(base), forget=FORGET, method="NPO", output=tmp_path / "run",
                         run=RunOptions(track="wandb"))  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.fixture
def hub(monkeypatch):
    """A server that takes what huggingface_hub uploads; returns the files by path."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = b""
            if "Content-Length" in self.headers:
                body = self.rfile.read(int(self.headers["Content-Length"]))
            else:  # in chunks, each after a line with its size
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
            if self.path.endswith("/create"):
                answer = {"url": f"{address}/me/model"}
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False}
                                    for path in paths]}  # fmt: skip
            elif "/validate-yaml" in self.path:
                answer = {"errors": [], "warnings": []}
            else:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = entry["value"]["content"]
                answer = {"commitUrl": f"{address}/me/model/commit/1", "commitOid": "1",
                          "success": True}  # fmt: skip
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    yield files
    server.shutdown()


def test_push_to_hub_uploads_the_model_with_its_card(run, hub):
    assert run.push_to_hub("me/model", token="hf_none").endswith("/me/model")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub)


def test_a_run_that_is_pushed_makes_its_repository_once(base, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, **options):
            calls.append(("create", repo))

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append(("upload", repo_id))
            assert (folder_path / "README.md").exists()

    monkeypatch.setattr("npo_fast.runs.hub.HfApi", Hub)
    npo_fast.unlearn(
        str(base), forget=FORGET, method="NPO", output=tmp_path / "run", training=TRAINING,
        report=QUIET, run=RunOptions(push_to_hub="me/model"),
    )  # fmt: skip
    assert calls == [("create", "me/model"), ("upload", "me/model")]


def test_a_card_that_cannot_be_written_leaves_the_earlier_one(run, monkeypatch):
    card = run.folder / "model/README.md"
    before = card.read_text()

    def save(self, path) -> None:
        Path(path).write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr("huggingface_hub.ModelCard.save", save)
    with pytest.raises(OSError, match="no space left"):
        write_card(run.folder / "model", run.metadata, {})
    assert card.read_text() == before
    assert not list(run.folder.rglob("*.partial"))


def test_a_push_that_cannot_work_is_refused_before_the_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot push to 'me/model'"):
        npo_fast.unlearn(str(base), forget=FORGET, method="NPO", output=tmp_path / "run",
                         run=RunOptions(push_to_hub="me/model"))  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_library_logs_and_does_not_print(base, tmp_path, monkeypatch, capsys):
    log = io.StringIO()
    logger = logging.getLogger("npo_fast")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(log)])
    monkeypatch.setattr(logger, "level", logging.INFO)
    npo_fast.finetune(str(base), train=FACTS, output=tmp_path / "run", training=TRAINING)
    assert "model saved in" in log.getvalue()
    assert capsys.readouterr().out == ""
