import pytest

from dispatchers.wer import word_errors


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors", "words"),
    [
        ("the black dog", "the black dog", 0, 3),
        ("The black, dog.", "the BLACK dog!", 0, 3),
        ("the black dog", "the dog", 1, 3),
        ("the dog", "the black dog", 1, 2),
        ("the black dog", "the back dog", 1, 3),
        ("one two three", "three two one", 2, 3),
        ("don’t go", "don't go", 0, 2),
        ("", "some thing", 2, 0),
        ("some thing", "", 2, 2),
        ("über 20 straße", "Über 20 Straße", 0, 3),
    ],
)
def test_word_errors(reference: str, hypothesis: str, errors: int, words: int) -> None:
    assert word_errors(reference, hypothesis) == (errors, words)
