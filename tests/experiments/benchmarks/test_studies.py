import pytest

from experiments.benchmarks import studies


class Measured:
    """Counts its calls, and is interrupted at one seed as often as asked."""

    def __init__(self, stop=None):
        self.stop, self.seeds = stop, []

    def __call__(self, seed):
        if seed == self.stop:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        return {"error": seed / 2}


def test_an_interrupted_call_continues(tmp_path):
    first, second = Measured(stop=3), Measured()
    with pytest.raises(KeyboardInterrupt):
        studies.outcomes("10% of 50/50", first, 5, str(tmp_path))
    found = studies.outcomes("10% of 50/50", second, 5, str(tmp_path))
    assert first.seeds == [0, 1, 2] and second.seeds == [3, 4]
    assert found == [{"error": seed / 2} for seed in range(5)]
    assert studies.outcomes("10% of 50/50", Measured(stop=0), 2, str(tmp_path)) == found[:2]


def test_other_sources_are_measured_again(tmp_path, monkeypatch):
    studies.outcomes("x", Measured(), 2, str(tmp_path))
    monkeypatch.setattr(studies, "_digest", lambda: "changed")
    again = Measured()
    studies.outcomes("x", again, 2, str(tmp_path))
    assert again.seeds == [0, 1]


def test_nothing_is_kept_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    studies.outcomes("x", Measured(), 2, "")
    assert not list(tmp_path.iterdir())
