"""Requests in a row: python examples/ten_requests.py MODEL REQUESTS RETAIN.jsonl OUTPUT

REQUESTS is a folder with a .jsonl file of questions and answers for each request, taken in order:
1.jsonl, 2.jsonl, …, 10.jsonl. Each starts from the model that the last one left. RETAIN is what the
model should know; what was asked to be forgotten is taken out of it. OUTPUT is a new folder.
"""

import argparse
from itertools import chain
from pathlib import Path

import numpy as np

import npo_fast
from npo_fast.data import load_records
from npo_fast.metrics import FORGET, RETAIN, probability


def main(model, requests, retain, output, lr, epochs):
    files = sorted(requests.glob("*.jsonl"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise npo_fast.UserError(f"{requests} holds no .jsonl file: put one there for each request")
    records = [load_records(file) for file in files]
    ends = np.cumsum([len(each) for each in records])
    keep = load_records(retain)
    runs = [model]  # folders, so that no earlier model stays in memory
    print("Mean probability of the answers of each request so far, and of those that are kept")
    for number, file in enumerate(files, 1):
        keep = [record for record in keep if record not in records[number - 1]]
        verdict = npo_fast.unlearn(
            runs[-1],
            forget=file,
            retain=keep,
            method=npo_fast.MethodOptions("NPO+RT", reference="first"),
            training=npo_fast.TrainSettings(lr=lr, epochs=epochs),
            output=output / file.stem,
        ).verdict
        runs.append(output / file.stem)
        logs = npo_fast.evaluate(
            runs[-1], forget=[*chain(*records[:number])], retain=keep, output=runs[-1] / "eval"
        ).logs
        requested = np.split(probability(logs[FORGET]), ends[: number - 1])
        told = " ".join(f"{values.mean():.3f}" for values in requested)
        kept = probability(logs[RETAIN]).mean()
        print(f"after {file.stem}: {told}, kept {kept:.3f}: {verdict.outcome}", flush=True)
    npo_fast.report(runs[1:], output=output / "report.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, kind in {"model": str, "requests": Path, "retain": str, "output": Path}.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=10)
    try:
        main(**vars(parser.parse_args()))
    except npo_fast.UserError as error:  # its message names the value and the cure
        parser.error(str(error))
