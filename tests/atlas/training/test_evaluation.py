import jax
import numpy as np
import pytest

from atlas.data import DataConfig, prepare, tasks, windows
from atlas.data.tokenizers import ByteTokenizer
from atlas.training.evaluation import evaluation_set, exact_matches, read
from models import Decoder, ModelConfig, token_losses
from tests.models.making import make_decoder

TOKENIZER = ByteTokenizer()
SEPARATOR, PADDING = TOKENIZER.separator, TOKENIZER.padding


def task_windows(task: str, window: int, count: int) -> np.ndarray:
    documents = tasks.documents(task, "validation", count * window, window, 0)
    return np.stack(list(windows.cut(TOKENIZER.encode_documents(documents), window, PADDING)))


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig(d_model=16, layers=1, heads=2, kv_heads=1, head_width=8, d_ff=16, attention="gated")
    return make_decoder(config)


@pytest.fixture(scope="module")
def tokens_CBS() -> np.ndarray:
    """The last row is padding only."""
    tokens_CBS = task_windows("tracking", 64, 6).reshape(3, 2, -1)
    tokens_CBS[2, 1] = PADDING
    return tokens_CBS


@pytest.fixture(scope="module")
def reading(model, tokens_CBS) -> tuple[np.ndarray, dict]:
    correct_CBT, metrics = jax.jit(lambda tokens: read(model, tokens, SEPARATOR, PADDING))(tokens_CBS)
    return np.asarray(correct_CBT), metrics


def test_a_token_is_correct_where_its_loss_is_the_least_of_all(model, tokens_CBS, reading):
    """Against the losses of every token of the vocabulary, by the function that training uses."""
    row = tokens_CBS[1, 1]
    second = int(np.flatnonzero(row == SEPARATOR)[0]) + 1
    assert second < 64, "the window must hold several documents"
    losses_of = jax.jit(lambda tokens: token_losses(model, tokens, SEPARATOR, PADDING)[0])
    for target in (second - 1, second + 5):
        others = np.tile(row, (288, 1))
        others[:, target + 1] = np.arange(288)
        first_choice = np.argmin(losses_of(others)[:, target])
        assert reading[0][1, 1, target] == (first_choice == row[target + 1])


def test_metrics_are_the_means_over_chunks(model, tokens_CBS, reading):
    metrics_of = jax.jit(lambda tokens: token_losses(model, tokens, SEPARATOR, PADDING, measure=True)[2])
    chunks = [metrics_of(tokens_BS) for tokens_BS in tokens_CBS]
    assert reading[1].keys() == chunks[0].keys()
    for name, value in reading[1].items():
        np.testing.assert_allclose(value, np.mean([chunk[name] for chunk in chunks]), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_matches_count_scored_answers_by_length(task):
    tokens_NS = task_windows(task, 128, 12)
    rows, positions, lengths = tasks.answers(tokens_NS, SEPARATOR)
    only_answers = np.zeros((12, 128), bool)
    only_answers[rows, positions] = True
    totals = {n: int((lengths == n).sum()) for n in (32, 64, 128)}
    assert exact_matches(tokens_NS, only_answers, SEPARATOR) == {n: (total, total) for n, total in totals.items()}
    assert exact_matches(tokens_NS, ~only_answers, SEPARATOR) == {n: (0, total) for n, total in totals.items()}
    only_answers[rows[3], positions[3]] = False
    found = exact_matches(tokens_NS, only_answers, SEPARATOR)
    assert {n: total - right for n, (right, total) in found.items() if right < total} == {lengths[3]: 1}


def test_rows_of_padding_hold_no_documents():
    tokens_NS = task_windows("needle", 64, 2)
    padded = np.concatenate([tokens_NS, np.full_like(tokens_NS, PADDING)])
    correct = np.ones((4, 64), bool)
    assert exact_matches(padded, correct, SEPARATOR) == exact_matches(tokens_NS, correct[:2], SEPARATOR)


def test_of_a_task_the_answers_are_scored_and_of_text_every_token(tmp_path):
    data = DataConfig(source="synthetic", languages=("a1",), tasks=("needle",), window=64, synthetic_tokens=20_000)
    corpus = prepare(data, tmp_path)
    found = evaluation_set(corpus, 3, 2, data.tasks)
    text, task = (found.language == corpus.languages.index(name) for name in ("a1", "needle"))
    np.testing.assert_array_equal(found.scored[text], found.tokens[text][..., 1:] != PADDING)
    asked = found.tokens[task][..., :-2] == ord("?")  # the key follows, and the answer
    np.testing.assert_array_equal(found.scored[task][..., 1:], asked)
    assert found.targets[corpus.languages.index("needle")] == asked.sum() > 3
