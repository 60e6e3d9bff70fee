"""A gang in a notebook: a real Jupyter kernel runs the cells."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELLS = """
from xdit_launcher import Gang
gang = Gang(["usp"], {settings})
print(gang)
---
heart = gang.generate("a red fox", steps=3)
heart.images[0]
---
job = gang.submit("a red fox", steps=400)
for event in job.events():
    if event.kind == "step":
        job.cancel()
print(job.status)
---
try:
    gang.generate("a red fox", steps=0)
except Exception as error:
    print(error)
---
gang.close()
print(gang)
"""


def test_cells_of_a_notebook(tiny_sd3_folder: Path, tmp_path: Path) -> None:
    settings = {
        "model": "sd3",
        "model.path": str(tiny_sd3_folder),
        "device": "cpu",
        "threads": 1,
        "usp.ulysses": 2,
        "usp.ring": 1,
        "max_sequence_length": 5,
        "runs": str(tmp_path / "runs"),
    }
    cells = CELLS.replace("{settings}", json.dumps(settings)).split("---")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def printed(cell: int) -> str:
        return "".join(o.get("text", "") for o in notebook.cells[cell].outputs if o.output_type == "stream")

    outputs = notebook.cells[1].outputs
    assert "2 ranks, ready" in printed(0)
    assert any("image/png" in o.get("data", {}) for o in outputs if o.output_type == "execute_result")
    shown = printed(1) + json.dumps([o.get("data", {}) for o in outputs])
    assert "3/3" in shown  # the progress bar, which a notebook has without being asked for
    assert "cancelled" in printed(2) and "steps=0 is too small; give 1 or more" in printed(3) and "ended" in printed(4)
