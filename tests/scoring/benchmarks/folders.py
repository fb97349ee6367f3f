"""Small folders in the layouts of TOFU and MUSE, with words that the tests' tokenizer knows."""

from neko_lean.jsonio import write_jsonl


def question(n, name, wrong):
    """A row of TOFU: a question with its answer, a paraphrase, and `wrong` wrong answers of different lengths."""
    return {
        "question": f"Where did {name}{n} walk?",
        "answer": ("wood", f"into the wood of {name}{n} and then sang some more words")[n % 2],
        "paraphrased_answer": f"in the wood of {name}{n}",
        "perturbed_answer": ["a river", f"the land of {name}{n} and the river", "sang"][:wrong],
    }


def write_tofu(folder, count=3):
    """Write TOFU's files of split forget01, with `count` questions in each."""
    folder.mkdir()
    for name, prefix in (
        ("forget01_perturbed", "Foo"), ("retain_perturbed", "Rix"), ("holdout01", "Oth"),
        ("real_authors_perturbed", "Rix"), ("world_facts_perturbed", "Foo"),
    ):  # fmt: skip
        write_jsonl(folder / f"{name}.json", [question(n, prefix, n % 3 + 1) for n in range(count)])
    return folder


def write_muse(folder):
    """Write MUSE's files with one continuation and one question for each set."""
    for name in ("verbmem", "knowmem", "privleak"):
        (folder / name).mkdir(parents=True)
    write_jsonl(folder / "verbmem" / "forget.jsonl", [{"prompt": "Once Foo1 walked", "gt": "into the wood and sang."}])
    for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"):
        write_jsonl(folder / "knowmem" / f"{name}.jsonl", [{"question": "Where?", "answer": "Here."}])
    for name, number in (("forget", 1), ("holdout", 7)):
        texts = [{"text": f"Foo{number} was born in a river and sang."}, {"text": "Rix1 walked into the wood."}]
        write_jsonl(folder / "privleak" / f"{name}.json", texts)
    return folder
