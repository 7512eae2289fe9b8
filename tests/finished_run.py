"""Results of a finished experiment with stand-ins for checkpoints and model, for tests of what `clean` may free."""

import hashlib
import json
from pathlib import Path

from training_helpers import write_checkpoint


class Finished:
    """Results of an experiment whose model is verified, with four checkpoints."""

    def __init__(self, folder: Path):
        self.results = folder / "results" / "one"
        self.run = self.results / "train" / "runs" / "abc"
        for step in (10, 20, 30):
            write_checkpoint(self.run, step)
        write_checkpoint(self.run, 15, commit=False)
        (self.run / "step_5.incomplete").mkdir()
        (self.run / "metrics.jsonl").write_text("{}\n")
        self.model = self.results / "model"
        self.model.mkdir()
        (self.model / "model.safetensors").write_bytes(b"weights")
        self.file = self.model / "model.safetensors"
        last = self.run / "step_30"
        self.receipt("train", "2026-01-01", {"run": str(self.run), "checkpoint": str(last)}, {"run_id": "abc"})
        self.convert()
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        self.verified = {"checks": {"names": {"passed": True, "detail": ""}}, "sha256": {self.file.name: digest}}
        self.verify()

    def convert(self, finished: str = "2026-01-02", fingerprint: str = "f") -> None:
        inputs = {"checkpoint": {"path": str(self.run / "step_30"), "fingerprint": fingerprint}}
        self.receipt("convert_checkpoint", finished, {"model": str(self.model)}, {}, inputs=inputs)

    def receipt(self, rule: str, finished: str, result: dict, figures: dict, **more) -> None:
        path = self.results / "receipts" / f"{rule}.json"
        path.parent.mkdir(exist_ok=True)
        content = {"schema": 1, "rule": rule, "finished": finished, "result": result, "figures": figures}
        content |= {"inputs": {}, "settings": {}}
        path.write_text(json.dumps(content | more))

    def verify(self, step: int = 30, finished: str = "2026-01-03", figures: dict | None = None) -> None:
        inputs = {"checkpoint": {"path": str(self.run / f"step_{step}"), "fingerprint": "f"}}
        self.receipt("verify_model", finished, {"model": str(self.model)}, figures or self.verified, inputs=inputs)

    def folders(self) -> set[str]:
        return {path.name for path in self.run.iterdir() if path.is_dir()}
