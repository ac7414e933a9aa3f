import pytest

from atlas.data import Corpus, prepare
from tests.atlas.training.worker import DATA


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of all tests here, where the processes that they start look for it."""
    return prepare(DATA, tmp_path_factory.getbasetemp() / "corpus")
