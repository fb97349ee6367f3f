"""Read and check everything that a score needs, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.cache import TeacherCache
from neko_lean.data import (
    SUFFIXES,
    Document,
    Example,
    PromptFormat,
    RowSource,
    encode_prompts,
    encode_texts,
    holds_only_texts,
    overlapping,
    paths_among,
    read_documents,
    read_rows,
    refuse_unused_split,
    require_folder,
    require_hub_package,
    with_prompt,
    without_overlap,
)
from neko_lean.errors import NekoLeanError
from neko_lean.extras import require_extra
from neko_lean.models import Model, check_seed, quantization_method
from neko_lean.options import OutputOptions, ScoreInputs, ScoreSettings
from neko_lean.outputs import Output, claim_file, claim_folder
from neko_lean.scoring.attacks import ATTACKS, check_attacks
from neko_lean.scoring.benchmarks.option import Benchmark, check_benchmark, read_benchmark
from neko_lean.scoring.generation import refuse_empty_prompts
from neko_lean.scoring.mmlu_data import Subject, read_mmlu
from neko_lean.scoring.paraphrases import Paraphrase, read_paraphrases
from neko_lean.scoring.passages import split_documents
from neko_lean.scoring.score_folder import FINISHED
from neko_lean.scoring.stored import read_score
from neko_lean.scoring.task import SPLITS, official_blind
from neko_lean.terminal import log_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MIA_FILES = "--mia needs a folder with member.jsonl and nonmember.jsonl, or a file of unseen documents"
SIDES = ("member", "nonmember")


DataSources = Mapping[str, RowSource]  # of each split; the same folder for both, or for a benchmark


def sources_of(
    data: str | Path | None, forget: RowSource | None, retain: RowSource | None, inputs: ScoreInputs
) -> DataSources:
    """Where the rows of each split come from.

    Raises NekoLeanError unless either `data` or both sets are given, and for a benchmark without its folder.
    """
    if data is not None and (forget is not None or retain is not None):
        raise NekoLeanError("--data already names both sets; leave out --forget and --retain, or leave out --data.")
    if data is not None:
        return dict.fromkeys(SPLITS, data)
    if inputs.benchmark is not None:
        raise NekoLeanError(f"--benchmark {inputs.benchmark} needs --data, the folder with its files.")
    if forget is None or retain is None:
        missing = "--data is" if forget is retain is None else "--forget is" if forget is None else "--retain is"
        raise NekoLeanError(
            f"{missing} missing: give --data FOLDER with forget.* and retain.*, or both --forget and --retain."
        )
    refuse_unused_split(inputs.split, forget, retain)
    return {"forget": forget, "retain": retain}


@dataclass(frozen=True)
class ScoreData:
    """The data of a score.

    Attributes:
        rows: the rows of each split, as they were read.
        examples: pairs of split and example, the forget set first. Documents are split into passages.
        documents: pairs of side ("member" or "nonmember") and document, for membership inference.
        held_out: documents that no model was trained on.
        paraphrases: paraphrases of the examples.
        subjects: MMLU's subjects by name.
        before: the score before unlearning.
        teacher: the cache with a reference model's losses.
        benchmark: the benchmark, whose rows the examples are.
    """

    rows: Mapping[str, Sequence[Example]]
    examples: list[tuple[str, Example]]
    documents: list[tuple[str, Document]]
    held_out: list[Document]
    paraphrases: list[Paraphrase]
    subjects: dict[str, Subject] | None
    before: dict[str, Any] | None
    teacher: TeacherCache | None
    benchmark: Benchmark | None = None

    def split(self, name: str) -> list[Example]:
        """The examples of one split."""
        return [example for split, example in self.examples if split == name]

    @property
    def all_examples(self) -> list[Example]:
        """The examples of both splits, in the order of generations.jsonl."""
        return [example for _, example in self.examples]


def check_settings(inputs: ScoreInputs, settings: ScoreSettings) -> None:
    """Raise NekoLeanError for settings that are invalid or would have no effect."""
    check_benchmark(inputs, settings)
    for name, value in (("batch-size", settings.batch_size), ("max-new-tokens", settings.max_new_tokens)):
        if value is not None and value < 1:
            raise NekoLeanError(f"--{name} must be at least 1, got {value}.")
    if settings.shots is not None and inputs.mmlu is None:
        raise NekoLeanError("--shots has no effect without --mmlu: give both or neither.")
    if settings.lm_eval:
        require_extra("lm_eval", "lm-eval", "--lm-eval")
    check_attacks(settings)
    require_hub_package(inputs.mia)
    if settings.seed is not None:
        check_seed(settings.seed)


def read_data(sources: DataSources, inputs: ScoreInputs, settings: ScoreSettings) -> ScoreData:
    """Read all data and check that every requested measurement has what it needs."""
    if inputs.reference is not None and inputs.mia is None:
        raise NekoLeanError("--reference has no effect without --mia, whose documents it is compared on: give both.")
    if inputs.reference is not None and inputs.mia is not None and not _has_sides(Path(inputs.mia)):
        raise NekoLeanError(f"--reference needs --mia as a folder with member.* and nonmember.*, but got {inputs.mia}.")
    folder = sources["forget"]
    benchmark = read_benchmark(folder, inputs) if isinstance(folder, (str, Path)) else None
    rows = _read_splits(sources, inputs) if benchmark is None else benchmark.rows.by_split
    examples = [(split, example) for split in SPLITS for example in split_documents(rows[split])]
    documents = [] if inputs.mia is None else _membership_documents(Path(inputs.mia), rows["forget"], inputs.columns)
    held_help = "--held needs a JSONL file with a column document"
    held_out = [] if inputs.held is None else read_documents(Path(inputs.held), held_help)
    _refuse_trained(held_out, rows, inputs)
    paraphrases = (
        [] if inputs.paraphrases is None else read_paraphrases(inputs.paraphrases, [example for _, example in examples])
    )
    subjects = None if inputs.mmlu is None else read_mmlu(Path(inputs.mmlu))
    before = None if inputs.before is None else read_score(inputs.before, examples)
    teacher = None if inputs.reference is None else TeacherCache(inputs.reference)

    result = ScoreData(rows, examples, documents, held_out, paraphrases, subjects, before, teacher, benchmark)
    _check_paraphrases(result, inputs, settings)
    return result


def _read_splits(sources: DataSources, inputs: ScoreInputs) -> Mapping[str, Sequence[Example]]:
    """The rows of forget set and retain set, without retain rows that are also in the forget set."""
    if sources["forget"] is sources["retain"] and isinstance(sources["forget"], (str, Path)):
        require_folder(sources["forget"], "--data", SPLITS, inputs.split)
    rows = {split: read_rows(sources[split], split, inputs.split, columns=inputs.columns) for split in SPLITS}
    return {**rows, "retain": without_overlap(rows["forget"], rows["retain"], "retain", drop=inputs.drop_overlap)}


def _membership_documents(path: Path, forget: Sequence[Example], columns: str | None) -> list[tuple[str, Document]]:
    """Members and non-members as pairs of side and document.

    Args:
        path: a folder with both, each as a data file or as a folder of texts; or a data set of unseen documents, and
            the members are then the forget rows of the same kind: questions if there are unseen questions, documents
            if there are unseen documents. An attack would recognise a question among documents by its length.
        forget: the forget rows.
        columns: the columns of a data set of unseen documents, as for `read_rows`.

    Raises:
        NekoLeanError: if the documents cannot be read, a document is on both sides, or all forget rows are of
            another kind than the unseen ones.
    """
    if _has_sides(path):
        sides = {side: read_documents(membership_path(path, side), MIA_FILES) for side in SIDES}
    else:
        unseen = read_rows(path, columns=columns)
        kinds = {row.kind == "qa" for row in unseen}
        members = [row for row in forget if (row.kind == "qa") in kinds]
        if not members:
            found, expected = ("questions", "documents") if True in kinds else ("documents", "questions")
            raise NekoLeanError(
                f"--mia {path}: its rows are {found} and the forget rows are {expected}; expected unseen rows of the "
                f"same kind."
            )
        sides = {
            side: [Document(row.text.strip(), row.task) for row in rows]
            for side, rows in zip(SIDES, (members, unseen), strict=True)
        }
    both = overlapping(*([document.text for document in sides[side]] for side in SIDES))
    if both:
        of_what = "members" if _has_sides(path) else "forget rows"
        raise NekoLeanError(
            f"--mia {path}: {len(both)} of its unseen documents are also {of_what}; expected documents that the model "
            f"has never seen."
        )
    return [(side, document) for side in SIDES for document in sides[side]]


def _refuse_trained(held_out: Sequence[Document], rows: Mapping[str, Sequence[Example]], inputs: ScoreInputs) -> None:
    """Raise NekoLeanError if a held-out document is a row of the data."""
    trained = [row.text for examples in rows.values() for row in examples]
    common = overlapping(trained, [document.text for document in held_out])
    if common:
        raise NekoLeanError(
            f"--held {inputs.held}: {len(common)} of its {len(held_out)} documents are also rows of the data; expected "
            f"documents that no model was trained on."
        )


def _has_sides(path: Path) -> bool:
    """Whether --mia is a folder with members and non-members, not a data set of unseen documents."""
    return path.is_dir() and not holds_only_texts(path)


def membership_path(path: Path, side: str) -> Path:
    """The data file or the folder of texts with the documents of one side of --mia.

    If the folder has neither, this is the usual file, and reading it says that it is missing. A data set of unseen
    documents is itself the path of the non-members.
    """
    if not _has_sides(path):
        return path
    names = (f"{side}{suffix}" for suffix in SUFFIXES)
    found = (path / name for name in (*names, side) if (path / name).exists())
    return next(found, path / f"{side}.jsonl")


def _check_paraphrases(data: ScoreData, inputs: ScoreInputs, settings: ScoreSettings) -> None:
    """Raise NekoLeanError if an attack lacks paraphrases, or if the paraphrases are used for nothing."""
    users = [attack.name for attack in ATTACKS.values() if attack.needs_paraphrases]
    requested = [name for name in users if name in settings.attacks]
    forget_ids = {example.id for example in data.split("forget")}
    if requested and not any(paraphrase.input for paraphrase in data.paraphrases if paraphrase.id in forget_ids):
        raise NekoLeanError(
            f"--attack {requested[0]} needs --paraphrases FILE with an input for at least one forget row."
        )
    if data.paraphrases and not requested and not any(paraphrase.output for paraphrase in data.paraphrases):
        raise NekoLeanError(
            f"--paraphrases {inputs.paraphrases} has no effect: it only holds inputs, which are for --attack "
            f"{users[0]}; give that, too."
        )


def claim_outputs(
    model: Model, sources: DataSources, out: str | Path, inputs: ScoreInputs, run: OutputOptions
) -> tuple[Output, Output | None]:
    """Check that the outputs may be written; returns that of the score, and that of --official if it was given."""
    read = [*paths_among(model, *sources.values()), inputs.mia, inputs.held, inputs.reference, inputs.paraphrases]
    read += [inputs.mmlu, inputs.before, inputs.gold]
    output = claim_folder(out, "partial", read, overwrite=run.overwrite, resume=run.resume)
    if inputs.official is None:
        return output, None
    official = claim_file(inputs.official, "--official", read, overwrite=run.overwrite or run.resume)
    if official.path.parent == output.path and official.path.name in FINISHED:
        raise NekoLeanError(
            f"--official {inputs.official} is a file that score itself writes there; choose another name."
        )
    return output, official


def check_lm_eval(folder: Path, settings: ScoreSettings) -> None:
    """Raise NekoLeanError if lm-eval would evaluate other weights than the rest of the score."""
    method = quantization_method(folder) if settings.lm_eval else None
    if method is not None:
        raise NekoLeanError(
            f"--lm-eval would evaluate the quantized weights of {folder} ({method}), but everything else uses plain "
            f"weights; give the checkpoint in bfloat16, float16 or float32."
        )


def check_lengths(data: ScoreData, tokenizer: PreTrainedTokenizerBase, prompts: PromptFormat) -> None:
    """Raise NekoLeanError for a prompt without tokens, and for a document of fewer than two tokens."""
    examples = data.all_examples
    by_id = {example.id: example for example in examples}
    paraphrased = [
        with_prompt(by_id[paraphrase.id], paraphrase.input)
        for paraphrase in data.paraphrases
        if paraphrase.input is not None
    ]
    for prompted in (examples, paraphrased):
        refuse_empty_prompts(prompted, encode_prompts(prompted, tokenizer, prompts))

    for option, documents in (("--mia", [document for _, document in data.documents]), ("--held", data.held_out)):
        encoded = encode_texts(tokenizer, [document.text for document in documents])
        short = next((number for number, ids in enumerate(encoded, start=1) if len(ids) < 2), None)
        if short is not None:
            raise NekoLeanError(f"{option}: document {short} has fewer than two tokens, so it has no loss; remove it.")


def count_blind(data: ScoreData, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, int]]:
    """Count the examples of each split that the official scores cannot judge, and warn about them, even if quiet."""
    blind = {split: official_blind(data.split(split), tokenizer.clean_up_tokenization) for split in SPLITS}
    _warn_of_blind(blind, {split: len(data.split(split)) for split in SPLITS})
    return blind


def _warn_of_blind(blind: Mapping[str, Mapping[str, int]], totals: Mapping[str, int]) -> None:
    for split, total in totals.items():
        unscorable, unseen = blind[split]["unscorable"], blind[split]["mostly_unseen"]
        parts: Sequence[str] = [
            *([f"{unscorable} of {total} {split} rows score below 1 for their own true answer"] if unscorable else []),
            *([f"it sees less than half of the words of {unseen} of {total} {split} rows"] if unseen else []),
        ]
        if parts:
            log_line(
                f"warning: the official scores do not measure some rows, because they only know English letters and "
                f"depend on spacing: {'; '.join(parts)}. unicode_cells measure these rows, and the verdict uses those."
            )
