"""Generations and losses as CSV files: written, read by pandas and by us, and what is said of bad ones."""

import math

import pytest

from unlearnjax.errors import UserError
from unlearnjax.evaluation.csvs import (
    Loss,
    Scored,
    read_folder,
    read_generations,
    read_losses,
    write_generations,
    write_losses,
)

ROWS = [
    Scored('"ab"sc1', "Task1", 'He said "go",\nand went.', "a, b", " \r spaces ", 0.1 + 0.2),
    Scored("7qa0", "Task2", "Wer? Ünï \u2028 x", "1999", "", math.nan),
]


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "forget_0.csv"
    write_generations(path, ROWS)
    back = read_generations(path)
    assert back[0] == ROWS[0]
    assert back[1][:5] == ROWS[1][:5] and math.isnan(back[1].nll)
    assert [p.name for p in path.parent.iterdir()] == ["forget_0.csv"]
    losses = [Loss("a", 1.25), Loss("b", 1e-7)]
    write_losses(tmp_path / "member_0.csv", losses)
    assert read_losses(tmp_path / "member_0.csv") == losses


def test_pandas_reads_the_official_columns(tmp_path):
    pd = pytest.importorskip("pandas")
    write_generations(tmp_path / "f.csv", ROWS)
    frame = pd.read_csv(tmp_path / "f.csv")
    assert list(frame.columns) == ["id", "task", "input", "expected_output", "model_output", "nll"]
    assert frame["id"].tolist() == [row.id for row in ROWS] and frame["model_output"][0] == ROWS[0].model_output
    assert frame["nll"][0] == ROWS[0].nll and math.isnan(frame["nll"][1])
    # And we read what pandas writes.
    frame.assign(extra=1, model_output=["a\nb", ""]).to_csv(tmp_path / "g.csv", index=False)
    assert read_generations(tmp_path / "g.csv")[0] == ROWS[0]._replace(model_output="a\nb")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"forget_0\.csv: no such file"),
        ("", r"forget_0\.csv: empty file"),
        (
            "id,task,expected_output,model_ouput\n",
            r"forget_0\.csv: no column 'model_output'; did you mean 'model_ouput'",
        ),
        ("id,task,expected_output,model_output\na,b,c\n", r"forget_0\.csv, row 1: 3 cells for 4 columns"),
        (
            "id,task,expected_output,model_output,nll\na,b,c,d,1\na,b,c,d,x\n",
            r"row 2, column 'nll': 'x' is not a number",
        ),
        ('id,task,expected_output,model_output\na,b,c,"d\n', r"forget_0\.csv, row 1 \(line 2\): not CSV"),
        (b"id,task,expected_output,model_output\na,b,c,\xff\n", r"forget_0\.csv: not UTF-8 \(byte 43\)"),
    ],
)
def test_errors_name_file_row_and_column(tmp_path, content, message):
    path = tmp_path / "forget_0.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_generations(path)
    assert "\n" not in str(caught.value)


def test_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "none")
    write_generations(tmp_path / "forget_0.csv", ROWS)
    with pytest.raises(UserError, match=r"no retain_0\.csv"):
        read_folder(tmp_path)
    write_generations(tmp_path / "retain_0.csv", [])
    with pytest.raises(UserError, match=r"retain_0\.csv: holds no rows"):
        read_folder(tmp_path)
    for number in (0, 10, 2):
        write_generations(tmp_path / f"retain_{number}.csv", [ROWS[0]._replace(id=str(number))])
    found = read_folder(tmp_path)
    assert [rows[0].id for rows in found.retain] == ["0", "2", "10"] and len(found.forget) == 1
    assert found.members is None and found.nonmembers is None
    write_losses(tmp_path / "mia_results" / "member_0.csv", [Loss("a", 1.0)])
    with pytest.raises(UserError, match=r"has member_\*\.csv but no nonmember_\*\.csv"):
        read_folder(tmp_path)
    (tmp_path / "mia_results" / "nonmember_0.csv").write_text("id,nll\na,\n")
    with pytest.raises(UserError, match=r"nonmember_0\.csv, row 1, column 'nll': no loss"):
        read_folder(tmp_path)
