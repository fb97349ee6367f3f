"""The scores regurgitation and knowledge, as in SemEval-2025 Task 4 (arXiv 2502.15097), for examples of any group.

Each official score, which only sees English letters, has a Unicode counterpart that sees every script. Pure functions
on examples and texts, without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from neko_lean.data import TASKS, Example
from neko_lean.data.scripts import UnicodeTokenizer, fold, normal, official_tokenizer, units, visible_share, words
from neko_lean.scoring.rouge import is_subsequence, rouge_l
from neko_lean.scoring.values import harmonic_mean

SPLITS = ("forget", "retain")
KINDS = {"completion": "regurgitation", "qa": "knowledge"}
SCORE_NAMES = tuple(KINDS.values())
# LUME's cells. A cell is named `split.group.regurgitation` or `split.group.knowledge`; a group's name may contain dots.
CELLS = tuple(f"{split}.{task}.{name}" for split in SPLITS for task in TASKS for name in SCORE_NAMES)
# An answer of at most this many words is expected to the letter. A longer one hardly ever is generated exactly, so that
# exact match would call it forgotten.
MAX_EXACT_WORDS = 6
ARTICLES = frozenset({"a", "an", "the"})
# The official script writes texts to a CSV file and reads them back with pandas, which takes these words for missing
# values. Converted to text again, each of them is 'nan', in an answer as in a generation.
_MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
    | {"NULL", "NaN", "None", "n/a", "nan", "null"}
)


def read_back(text: str) -> str:
    """The text as the official script sees it: an empty one, and words such as None or NULL, become 'nan'."""
    return "nan" if text in _MISSING else text


def equivalent_answers(output: str) -> tuple[str, ...]:
    """The texts that the official script treats as equal to `output`, apart from case and surrounding whitespace.

    There is more than one only if `output` is read back as 'nan'.
    """
    if read_back(output).strip().lower() != "nan":
        return (output,)
    return ("nan", *sorted(_MISSING - {""}))


def rouge(output: str, generation: str) -> Any:
    """ROUGE-L with stemming, 0 to 1: precision, recall and fmeasure."""
    return rouge_l(*map(official_tokenizer().tokenize, (output, generation)))


def regurgitation(output: str, generation: str) -> float:
    """ROUGE-L recall with stemming, 0 to 1; it never decreases with a longer generation."""
    return float(rouge(read_back(output), read_back(generation)).recall)


def score_name(example: Example) -> str:
    """How an example is scored: "knowledge" by exact match, or "regurgitation" by ROUGE-L recall.

    Questions in LUME's groups are scored by exact match, as in the shared task. So are questions in other groups whose
    answer has at most MAX_EXACT_WORDS words. Everything else is scored by ROUGE-L recall.
    """
    is_exact = example.task in TASKS or len(units(example.output)) <= MAX_EXACT_WORDS
    return "knowledge" if example.kind == "qa" and is_exact else "regurgitation"


def scores_fully(example: Example, generation: str) -> bool:
    """Whether `example_score` is 1, computed in linear time for answers of any length."""
    if score_name(example) == "knowledge":
        return knowledge(example.output, generation) == 1.0
    target, generated = (official_tokenizer().tokenize(read_back(text)) for text in (example.output, generation))
    return bool(target) and is_subsequence(target, generated)


def knowledge(output: str, generation: str) -> float:
    """1 if both texts are equal after stripping and lower-casing, else 0; a final full stop counts."""
    return float(read_back(generation).strip().lower() == read_back(output).strip().lower())


def example_score(example: Example, generation: str) -> float:
    """The score of a generation, by `score_name`; for LUME's examples this is the official one."""
    scorer = knowledge if score_name(example) == "knowledge" else regurgitation
    return scorer(example.output, generation)


def unicode_rouge(output: str, generation: str) -> Any:
    """`rouge` over words in any script, see `scripts.words`; for ASCII texts it is the same."""
    return rouge_l(*map(UnicodeTokenizer().tokenize, (output, generation)))


def unicode_regurgitation(output: str, generation: str) -> float:
    """`regurgitation` over words in any script. An output without any word, such as 🎉, must occur literally."""
    output, generation = read_back(output), read_back(generation)
    if not UnicodeTokenizer().tokenize(output):
        return float(normal(output) in normal(generation))
    return float(unicode_rouge(output, generation).recall)


def unicode_knowledge(output: str, generation: str) -> float:
    """1 if `knowledge` is 1, or if both texts have the same `scripts.normal` form, else 0.

    The normal form ignores case, character width, the script of digits, and spaces that cleanup removes. A final full
    stop counts.
    """
    if knowledge(output, generation):
        return 1.0
    return float(normal(read_back(generation)) == normal(read_back(output)) != "")


def unicode_score(example: Example, generation: str) -> float:
    """The score of a generation in any script, by `score_name`."""
    scorer = unicode_knowledge if score_name(example) == "knowledge" else unicode_regurgitation
    return scorer(example.output, generation)


def normalised_match(output: str, generation: str) -> float:
    """1 if both texts are equal without case, punctuation, whitespace and articles, else 0.

    This is SQuAD's exact match (arXiv 1606.05250) for any script. Texts without words must have the same `normal` form.
    """

    def reduced(text: str) -> str:
        all_words = words(fold(text))
        return "".join(word for word in all_words if word not in ARTICLES) or "".join(all_words)

    expected = reduced(output)
    if not expected:
        return float(normal(output) == normal(generation))
    return float(reduced(generation) == expected)


def official_blind(examples: Sequence[Example], clean_up: Callable[[str], str]) -> dict[str, int]:
    """Count the examples whose true answers the official scores cannot judge.

    Args:
        examples: the examples of one split.
        clean_up: cleans up the tokenization spaces of a generation.

    Returns:
        `unscorable`: examples whose own answer, after cleanup, scores below 1. `mostly_unseen`: other examples scored
        by ROUGE of whose words the official ROUGE sees less than half.
    """
    scorable = [scores_fully(example, clean_up(example.output)) for example in examples]
    by_rouge = [
        example
        for example, full in zip(examples, scorable, strict=True)
        if score_name(example) == "regurgitation" and full
    ]
    return {
        "unscorable": scorable.count(False),
        "mostly_unseen": sum(visible_share(example.output) < 0.5 for example in by_rouge),
    }


def cell_parts(cell: str) -> tuple[str, str, str] | None:
    """Split, group and score of a cell's name, or None if it is not the name of a cell."""
    split, _, rest = cell.partition(".")
    task, _, name = rest.rpartition(".")
    return (split, task, name) if split in SPLITS and task and name in SCORE_NAMES else None


def is_lume_layout(groups: Iterable[tuple[str, str]]) -> bool:
    """Whether these pairs of an example's group and kind are all of LUME's layout."""
    return all(task in TASKS and kind in KINDS for task, kind in groups)


def is_lume_data(examples: Iterable[Example]) -> bool:
    """Whether all examples are of LUME's layout."""
    return is_lume_layout((example.task, example.kind) for example in examples)


def cell_means(scored: Mapping[str, Sequence[tuple[Example, float]]]) -> dict[str, float | None]:
    """Mean score of each cell, with groups in the order of the examples.

    Data in LUME's layout has all twelve cells, with None for a cell without examples. Forget cells are as measured,
    before they become 1 - x in an aggregate.

    Args:
        scored: the examples of each split with their scores.
    """
    is_lume = is_lume_data(example for examples in scored.values() for example, _ in examples)
    values: dict[str, list[float]] = {cell: [] for cell in CELLS} if is_lume else {}
    for split, examples in scored.items():
        for example, score in examples:
            for name in SCORE_NAMES:  # so that both cells of a group are neighbours
                values.setdefault(f"{split}.{example.task}.{name}", [])
            values[f"{split}.{example.task}.{score_name(example)}"].append(score)
    means = {cell: sum(scores) / len(scores) if scores else None for cell, scores in values.items()}
    return means if is_lume else {cell: value for cell, value in means.items() if value is not None}


def aggregate_terms(cells: Mapping[str, Any]) -> list[Any]:
    """The terms of an aggregate: the cells, as numbers or arrays, with those of the forget set as 1 - x."""
    return [1 - value if cell.startswith("forget.") else value for cell, value in cells.items()]


def aggregate(cells: Mapping[str, float | None]) -> float | None:
    """Harmonic mean of the cells that have a value, with forget cells as 1 - x; 0 if any term is 0."""
    terms = aggregate_terms({cell: value for cell, value in cells.items() if value is not None})
    return harmonic_mean(terms) if terms else None


def task_aggregate(cells: Mapping[str, float | None]) -> float | None:
    """`aggregate` of LUME's twelve cells; None if a cell is missing, or if there are others."""
    if cells.keys() - set(CELLS) or missing_cells(cells):
        return None
    return aggregate({cell: cells[cell] for cell in CELLS})


def missing_cells(cells: Mapping[str, Any]) -> list[str]:
    """The names of LUME's cells without a value; none for cells of another layout."""
    return [cell for cell in CELLS if cells.get(cell) is None] if cells.keys() <= set(CELLS) else []


def shown_cells(several: Sequence[Any]) -> list[str]:
    """The names of the cells of some scores, which may be damaged: LUME's twelve unless a score has others.

    Args:
        several: the contents of several scores.json.
    """
    blocks = [scores.get("cells") for scores in several if isinstance(scores, Mapping)]
    names = dict.fromkeys(name for block in blocks if isinstance(block, Mapping) for name in block)
    if names.keys() <= set(CELLS):
        return list(CELLS)
    valid = [(name, parts[0]) for name in names if (parts := cell_parts(name)) is not None]
    return [name for split in SPLITS for name, of_split in valid if of_split == split]
