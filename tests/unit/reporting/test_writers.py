"""The files that the rows of a run go to."""

import math

import numpy as np
import pytest

from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.reporting.writers import CsvWriter, TensorBoardWriter, Writers, read_csv
from hvd_dqn.training.ledger import COLUMNS, Ledger


def report(ledger):
    return ledger.report(total_steps=100, cycle=9, updates=50, epsilon=0.1, learning_rate=1e-3, replay_size=80)


def rows(*steps):
    return [{"total_steps": step, "loss": step / 3, "return_mean": math.nan} for step in steps]


def write(path, some, **options):
    writer = CsvWriter(path, ("total_steps", "loss", "return_mean"), **options)
    for row in some:
        writer.write(row)
    writer.close()


def test_nan_becomes_an_empty_cell_and_numbers_are_short(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, rows(1, 1000))
    assert path.read_text() == "total_steps,loss,return_mean\n1,0.333333,\n1000,333.333,\n"


def test_large_counts_are_written_in_full(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, [{"total_steps": 123_456_789, "loss": np.float32(0.5), "return_mean": -0.0}])
    assert path.read_text().splitlines()[1] == "123456789,0.5,-0"


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = CsvWriter(tmp_path / "metrics.csv")
    row = report(Ledger(Solo()))
    writer.write(row)
    table = read_csv(tmp_path / "metrics.csv")
    assert list(table) == list(COLUMNS)
    np.testing.assert_allclose([table[name][0] for name in COLUMNS], list(row.values()), rtol=1e-5)


def test_a_resumed_file_goes_on_after_the_checkpoint_with_one_header(tmp_path):
    path = tmp_path / "metrics.csv"
    for written, checkpoint, then, expected in [
        ([10, 20, 30, 40], 20, [30], [10, 20, 30]),
        ([10, 20, 30, 40], 25, [30, 40], [10, 20, 30, 40]),
        ([10, 20], 20, [], [10, 20]),
        ([10, 20], 5, [10], [10]),
        ([], 20, [30], [30]),
    ]:
        write(path, rows(*written))
        write(path, rows(*then), append_after=checkpoint)
        assert path.read_text().count("total_steps") == 1
        assert read_csv(path)["total_steps"].tolist() == expected, (written, checkpoint)
        assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_line_cut_by_the_crash_is_dropped_on_resume_even_below_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, rows(10, 20))
    with path.open("a") as file:
        file.write("3")  # of 30000: "3" alone would look like a row from before the checkpoint
    write(path, rows(30), append_after=25)
    assert read_csv(path)["total_steps"].tolist() == [10, 20, 30]


def test_resuming_without_a_file_begins_one_and_a_new_run_begins_anew(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, rows(30), append_after=20)
    assert read_csv(path)["total_steps"].tolist() == [30]
    write(path, rows(5))
    assert read_csv(path)["total_steps"].tolist() == [5]


def test_a_file_with_other_columns_is_not_continued(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("total_steps,loss\n10,1\n")
    with pytest.raises(InputError, match=r"other columns\. Expected: total_steps,loss,return_mean\. Received: total_"):
        write(path, [], append_after=20)
    assert path.read_text() == "total_steps,loss\n10,1\n"


def test_what_is_no_table_of_numbers_is_refused_in_one_line_that_names_the_place(tmp_path):
    path = tmp_path / "metrics.csv"
    for content, complaint in [
        (b"", "has no header line"),
        (b"a,b\n1,2\n3\n", "line 3: 1 cells under 2 columns"),
        (b"a,b\n1,2,3\n", "line 2: 3 cells under 2 columns"),
        (b"a,b\n1,fast\n", "line 2: `b` is 'fast', not a number"),
        (b"\xff\xfe\n", "Cannot read"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=complaint) as caught:
            read_csv(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"Cannot read .*No such file"):
        read_csv(tmp_path / "nowhere.csv")


# TensorBoard and the others


def test_tensorboard_reads_back_the_numbers_that_were_written(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    writer = TensorBoardWriter(tmp_path / "training")
    writer.write({"total_steps": 1000, "episodes": 3, "loss": 0.125, "return_mean": math.nan})
    writer.write({"total_steps": 2000, "episodes": 0, "loss": 0.1, "return_mean": -7.5})
    writer.close()
    (file,) = (tmp_path / "training").iterdir()
    found = {
        (value.tag, event.step): make_ndarray(value.tensor).item()
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert found == {
        ("episodes", 1000): 3,
        ("loss", 1000): 0.125,
        ("episodes", 2000): 0,
        ("loss", 2000): pytest.approx(0.1),
        ("return_mean", 2000): -7.5,
    }


@pytest.mark.parametrize(("checkpoint", "then"), [(2000, [3000, 4000]), (2500, [3000]), (2999, []), (0, [1000])])
def test_tensorboard_shows_what_the_csv_file_says_after_a_crash_and_a_resume(checkpoint, then, tmp_path):
    # What TensorBoard itself reads with.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    def written(steps, loss, append_after=None):
        writers = Writers(
            CsvWriter(tmp_path / "metrics.csv", ("total_steps", "loss"), append_after),
            TensorBoardWriter(tmp_path / "board", append_after),
        )
        for step in steps:
            writers.write({"total_steps": step, "loss": loss})
        writers.close()

    written([1000, 2000, 3000], 0.5)
    written(then, 0.25, append_after=checkpoint)
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"tensors": 0})
    board.Reload()
    shown = [(event.step, event.tensor_proto.float_val[0]) for event in board.Tensors("loss")]
    table = read_csv(tmp_path / "metrics.csv")
    assert shown == list(zip(table["total_steps"].tolist(), table["loss"].tolist(), strict=True))
    assert [step for step, _ in shown if step > checkpoint] == then


def test_writers_pass_on_to_each():
    class Memory:
        def __init__(self):
            self.calls = []

        def write(self, row):
            self.calls.append(row)

        def close(self):
            self.calls.append("closed")

    first, second = Memory(), Memory()
    writers = Writers(first, second)
    writers.write({"total_steps": 1})
    writers.close()
    assert first.calls == second.calls == [{"total_steps": 1}, "closed"]


def test_a_file_may_go_on_with_other_optional_columns(tmp_path):
    path, optional = tmp_path / "metrics.csv", ("held", "restarts")
    for columns, row in [
        (("total_steps", "loss"), {"total_steps": 1, "loss": 0.5}),
        (("total_steps", "loss", "held"), {"total_steps": 2, "loss": 0.25, "held": 7}),
        (("total_steps", "loss", "restarts"), {"total_steps": 3, "loss": math.nan, "restarts": 1}),
    ]:
        writer = CsvWriter(path, columns, row["total_steps"] - 1, optional=optional)
        writer.write(row)
        writer.close()
    assert path.read_text().splitlines() == ["total_steps,loss,restarts,held", "1,0.5,,", "2,0.25,,7", "3,,1,"]
    with pytest.raises(InputError, match="other columns"):
        CsvWriter(path, ("total_steps", "gain"), 3, optional=optional)
