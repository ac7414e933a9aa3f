import pytest

from atlas.data import Corpus, prepare
from tests.atlas.training.worker import DATA


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(DATA, tmp_path_factory.mktemp("corpus"))
