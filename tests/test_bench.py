import bench
from incremental_cifar.command_line import run_script


def test_the_table_has_a_row_per_variant_and_its_numbers_add_up(capsys):
    assert run_script(bench.main, ["--device", "cpu", "--width", "1", "--batch-size", "4", "--steps", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| fp32") or line.startswith("| bf16")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in rows[:4]] == ["bare loop", *bench.ALGORITHMS]
    assert len(rows) == 2 * 4 + 2
    for row in rows[:8]:
        milliseconds, images = float(row[2]), float(row[3].replace(",", ""))
        assert abs(4000 / milliseconds - images) < 0.01 * images + 1
        if row[1] != "bare loop":
            assert abs(sum(map(float, row[4:7])) - milliseconds) < 0.05
    assert rows[0][7] == "1.000"


def test_bad_arguments_are_one_line(capsys):
    for arguments in (["--width", "0"], ["--steps", "many"], ["--device", "tpu"], ["--precisions", "fp8"], ["--batch-size", "2000"]):
        assert run_script(bench.main, arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
