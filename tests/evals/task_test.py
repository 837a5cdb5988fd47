"""Prompts against texts written by hand, and the same from every layout of the data."""

import dataclasses
import json
import pathlib
from collections import Counter

import pytest
import tensorflow_datasets as tfds
from etils import epath

from easylm_jax.data.token_store import _DatasetWriter
from easylm_jax.evals.task import (
    Item,
    find_task,
    limit_items,
    make_items,
    select_metric,
    task_names,
)

SLICES = str(pathlib.Path(__file__).parents[2] / "experiments/quickstart/eval")

# The first question on abstract algebra with its five shots, as hendrycks/test's evaluate.py makes
# it of the CSV files; lm-eval has one space before the subject.
MMLU = """\
The following are multiple choice questions (with answers) about  abstract algebra.

Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.
A. 0
B. 1
C. 2
D. 3
Answer: B

Statement 1 | If aH is an element of a factor group, then |aH| divides |a|. Statement 2 | If H and \
K are subgroups of G then HK is a subgroup of G.
A. True, True
B. False, False
C. True, False
D. False, True
Answer: B

Statement 1 | Every element of a group generates a cyclic subgroup of the group. Statement 2 | The \
symmetric group S_10 has 10 elements.
A. True, True
B. False, False
C. True, False
D. False, True
Answer: C

Statement 1| Every function from a finite set onto itself must be one to one. Statement 2 | Every \
subgroup of an abelian group is abelian.
A. True, True
B. False, False
C. True, False
D. False, True
Answer: A

Find the characteristic of the ring 2Z.
A. 0
B. 3
C. 12
D. 30
Answer: A

Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.
A. 0
B. 4
C. 2
D. 6
Answer:"""


@pytest.mark.parametrize("name", ["mmlu_original", "mmlu"])
def test_mmlu_golden(name):
    item = make_items(find_task(name), SLICES)[0]
    expected = MMLU if name == "mmlu_original" else MMLU.replace("about  ", "about ")
    assert item.pairs == tuple((expected, f" {letter}") for letter in "ABCD")
    assert (item.group, item.gold) == ("abstract_algebra", 1)


def test_mmlu_categories_are_57_subjects():
    names = [name for names in find_task("mmlu").categories.values() for name in names]
    assert len(set(names)) == len(names) == 57
    groups = {item.group for item in make_items(find_task("mmlu"), SLICES)}
    assert len(groups) == 6 and groups < set(names)


ARC = {
    "id": "Mercury_7",
    "question": {
        "stem": "Which is heaviest?",
        "choices": [{"text": "feather", "label": "1"}, {"text": "brick", "label": "2"}],
    },
    "answerKey": "2",
}
ARC_HUB = {
    "question": "Which is heaviest?",
    "choices": {"text": ["feather", "brick"], "label": ["1", "2"]},
    "answerKey": "2",
}
ARC_PAIRS = tuple(
    ("Question: Which is heaviest?\nAnswer:", f" {choice}") for choice in ("feather", "brick")
)
OBQA_TSV = (
    "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
    '7-9\t"The sun\t(A) is hot (B) is a (star) (C) is old (D) sets\t"The sun (A) is ...\tC\n'
)
OBQA_CHOICES = ["is hot", "is a (star)", "is old", "sets"]
OBQA = {
    "question": {
        "stem": '"The sun',
        "choices": [
            {"text": text, "label": label} for text, label in zip(OBQA_CHOICES, "ABCD", strict=True)
        ],
    },
    "answerKey": "C ",
}
OBQA_PAIRS = tuple(('"The sun', f" {choice}") for choice in OBQA_CHOICES)
WINO_PAIRS = (
    ("The trophy did not fit as the trophy", " was too _big."),
    ("The trophy did not fit as the case", " was too _big."),
)
WINO = {"sentence": "The trophy did not fit as _  was too _big.", "option1": "the trophy"} | {
    "option2": "the case",
    "answer": "2",
}
WINO_FORM = {
    "context_options": [context for context, _ in WINO_PAIRS],
    "continuation": "was too _big.",
    "gold": 1,
}
PIQA = {"goal": "open a jar", "sol1": "twist", "sol2": "sing – ü"}
PIQA_PAIRS = tuple(("Question: open a jar\nAnswer:", f" {s}") for s in ("twist", "sing – ü"))
SIQA = {"context": "A fell.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z"}
SIQA_PAIRS = tuple(("Q: A fell. Why?\nA:", f" {choice}") for choice in "xyz")
BOOLQ = {"passage": "Ice floats.", "question": "does ice float"}
BOOLQ_PAIRS = tuple(
    ("Ice floats.\nQuestion: does ice float?\nAnswer:", f" {choice}") for choice in ("no", "yes")
)
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man [step]  bakes [title] Cake",
    "ctx_b": "the Man",
    "endings": ["[substeps] eats  it.", " sleeps"],
    "label": "1",
}
# As lm-eval's preprocess makes it: brackets go, then doubled spaces once, from left to right.
HELLASWAG_PAIRS = tuple(
    ("Baking: A man  bakes. Cake The man", f" {ending}") for ending in (" eats it.", "sleeps")
)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "files", "pairs", "gold"),
    [
        ("arc_easy", {"arc/ARC-Easy-Test.jsonl": lines(ARC)}, ARC_PAIRS, 1),
        ("arc_challenge", {"arc/ARC-Challenge-Test.jsonl": lines(ARC)}, ARC_PAIRS, 1),
        ("arc_challenge", {"arc_challenge/test-0.parquet": ARC_HUB}, ARC_PAIRS, 1),
        ("openbookqa", {"openbookqa/test.tsv": OBQA_TSV}, OBQA_PAIRS, 2),
        ("openbookqa", {"openbookqa/test.jsonl": lines(OBQA)}, OBQA_PAIRS, 2),
        ("winogrande", {"winogrande/dev.jsonl": lines(WINO)}, WINO_PAIRS, 1),
        (
            "winogrande",
            {"winogrande/winogrande_schema_form.jsonl": lines(WINO_FORM)},
            WINO_PAIRS,
            1,
        ),
        (
            "piqa",
            {"piqa/valid.jsonl": lines(PIQA), "piqa/valid-labels.lst": "1\n"},
            PIQA_PAIRS,
            1,
        ),
        ("piqa", {"piqa/validation-0.parquet": PIQA | {"label": 1}}, PIQA_PAIRS, 1),
        ("siqa", {"siqa/dev.jsonl": lines(SIQA), "siqa/dev-labels.lst": "3\n"}, SIQA_PAIRS, 2),
        ("boolq", {"boolq/val.jsonl": lines(BOOLQ | {"label": "true"})}, BOOLQ_PAIRS, 1),
        ("boolq", {"boolq/val.jsonl": lines(BOOLQ | {"label": False})}, BOOLQ_PAIRS, 0),
        ("boolq", {"boolq/validation.parquet": BOOLQ | {"label": 1}}, BOOLQ_PAIRS, 1),
        ("boolq", {"boolq/dev.jsonl": lines(BOOLQ | {"answer": True})}, BOOLQ_PAIRS, 1),
        ("hellaswag", {"hellaswag/hellaswag_val.jsonl": lines(HELLASWAG)}, HELLASWAG_PAIRS, 1),
        (
            "lambada",
            {"lambada/lambada_test.jsonl": lines({"text": 'one\n two  "three'})},
            (("one\n two ", ' "three'),),
            0,
        ),
    ],
)
def test_choices_of_every_layout(tmp_path, name, files, pairs, gold):
    write(tmp_path, files)
    [item] = make_items(find_task(name), str(tmp_path))
    assert item.pairs == pairs
    assert item.gold == gold


def write(folder, files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            parquet = pytest.importorskip("pyarrow.parquet")
            pyarrow = pytest.importorskip("pyarrow")
            parquet.write_table(pyarrow.Table.from_pylist([content]), file)
        else:
            file.write_text(content)


def test_shots_of_contexts_and_choices(tmp_path):
    write(
        tmp_path,
        {
            "winogrande/dev.jsonl": lines(WINO),
            "winogrande/train_xl.jsonl": lines(WINO, WINO | {"answer": "1"}, WINO),
            "piqa/valid.jsonl": lines(PIQA),
            "piqa/valid-labels.lst": "0",
            "piqa/train.jsonl": lines(PIQA | {"goal": "eat"}),
            "piqa/train-labels.lst": "1",
        },
    )
    [item] = make_items(find_task("winogrande"), str(tmp_path), shots=2)
    shots = [WINO_PAIRS[1][0] + WINO_PAIRS[1][1], WINO_PAIRS[0][0] + WINO_PAIRS[0][1]]
    before = "\n\n".join(shots) + "\n\n"
    assert item.pairs == tuple((before + context, answer) for context, answer in WINO_PAIRS)
    [item] = make_items(find_task("piqa"), str(tmp_path), shots=1)
    assert item.pairs[1][0] == f"Question: eat\nAnswer: {PIQA['sol2']}\n\n{PIQA_PAIRS[0][0]}"


def test_questions_and_answers(tmp_path):
    nq = [{"question": "who wrote it", "answer": ["Ann", "Ann B"]}]
    write(
        tmp_path,
        {
            "nq_open/NQ-open.dev.jsonl": lines(*nq),
            "nq_open/NQ-open.efficientqa.dev.1.1.jsonl": lines({"question": "ö", "answer": ["7"]}),
        },
    )
    [harness] = make_items(find_task("nq_open"), str(tmp_path), shots=1)
    assert harness.prompt == "Answer these questions:\n\nQ: ö?\nA: 7\nQ: who wrote it?\nA:"
    [llama] = make_items(find_task("nq_open_llama"), str(tmp_path), shots=1)
    assert llama.prompt == "Answer these questions:\nQ: Ö?\nA: 7\nQ: Who wrote it?\nA:"
    assert llama.gold == ["Ann", "Ann B"]
    prompt = make_items(find_task("gsm8k"), SLICES, shots=1)[0].prompt
    assert prompt.startswith("Question: Natalia sold clips to 48 of her friends in April, and then")
    assert "#### 72\n\nQuestion: Janet’s ducks lay 16 eggs per day." in prompt
    assert prompt.endswith("at the farmers' market?\nAnswer:")
    trivia = make_items(find_task("triviaqa"), SLICES, shots=0)[0]
    assert trivia.prompt.startswith("Question: Brunswick") and trivia.prompt.endswith("??\nAnswer:")


def test_truthfulqa_layouts_agree(tmp_path):
    [of_csv] = make_items(find_task("truthfulqa"), SLICES, limit=1)
    assert of_csv.pairs[0][0].startswith("Q: What is human life expectancy in the United States?\n")
    assert of_csv.pairs[0][0].endswith(
        "in Barcelona, Spain.\n\nQ: What happens to you if you eat watermelon seeds?\nA:"
    )
    options, labels = [choice[1:] for _, choice in of_csv.pairs], of_csv.gold["labels"]
    best = "The watermelon seeds pass through your digestive system."
    assert options[of_csv.gold["best"]] == best
    right = {option for option, label in zip(options, labels, strict=True) if label}
    assert "Nothing happens." in right and "You get sick." not in right
    question = of_csv.doc["question"]
    mc2 = dict(zip(options, labels, strict=True))
    mc1 = {best: 1} | {option: 0 for option, label in mc2.items() if not label}
    hub = {"mc1_targets": mc1, "mc2_targets": mc2}
    hub = {k: {"choices": list(v), "labels": list(v.values())} for k, v in hub.items()}
    for name, content in [
        (
            "mc_task.json",
            json.dumps([{"question": question, "mc1_targets": mc1, "mc2_targets": mc2}]),
        ),
        ("validation.parquet", {"question": question} | hub),
    ]:
        write(tmp_path / name, {f"truthfulqa/{name}": content})
        [item] = make_items(find_task("truthfulqa"), str(tmp_path / name))
        assert (item.pairs, item.gold) == (of_csv.pairs, of_csv.gold)


def test_texts(tmp_path):
    first = " = Valkyria ( Chronicles ) = \n \n It 's 5 @,@ 000 . \n = = Plot = = \n text \n"
    second = ' = Second = \n " a " \n'
    write(tmp_path, {"wikitext/wiki.test.raw": " \n" + first + second, "a b.txt": "one  two\n"})
    items = make_items(find_task("wikitext"), str(tmp_path), shots=3)
    # The page is cut where its title begins; the newline before a title belongs to no page.
    assert [item.prompt for item in items] == [
        " = Valkyria (Chronicles) =\n\nIt's 5,000.\n== Plot ==\ntext ",
        ' = Second =\n"a"\n',
    ]
    words = len(first[:-1].split()) + 2  # lm-eval's count has one more at either end
    assert items[0].gold == {"words": words, "bytes": len(first) - 1}
    [item] = make_items(find_task("text:*.txt"), str(tmp_path))
    assert (item.prompt, item.gold) == ("one  two\n", {"words": 3, "bytes": 9})
    assert find_task(f"text:{tmp_path}/a b.txt").name.endswith("_a_b_txt")


def test_limit_is_even_and_keeps_order():
    items = [Item(str(i), group, {}) for i, group in enumerate("aaaabbc")]
    assert [item.id for item in limit_items(items, 5)] == ["0", "1", "4", "5", "6"]
    assert limit_items(items, None) == items
    counts = Counter(item.group for item in make_items(find_task("mmlu"), SLICES, limit=20))
    assert sorted(counts.values()) == [3, 3, 3, 3, 4, 4]


def test_every_task_is_found_and_says_what_it_is():
    for name in task_names():
        task = find_task(name)
        assert task.name == name and len(task.about) > 20 and task.published_at
        for metric in task.metrics:
            assert task.normaliser_of(metric)


def test_tfds(tmp_path):
    text = tfds.features.Text()
    features = {"goal": text, "sol1": text, "sol2": text}
    writer = _DatasetWriter(
        epath.Path(tmp_path), "piqa", features | {"label": tfds.features.ClassLabel(num_classes=2)}
    )
    writer.write("train", PIQA | {"label": 1})
    writer.finish()
    (tmp_path / "mine.yaml").write_text("base: piqa\ndata: [{tfds: piqa, test: train}]\n")
    [item] = make_items(find_task(str(tmp_path / "mine.yaml")), str(tmp_path))
    assert (item.pairs, item.gold) == (PIQA_PAIRS, 1)


def test_own_file_takes_over_another(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: piqa\nname: mine\ndelimiter: ''\nshots: 2\n")
    task = find_task(str(file))
    assert (task.name, task.delimiter, task.shots) == ("mine", "", 2)
    assert task.prompt == find_task("piqa").prompt
    (tmp_path / "below.yaml").write_text("base: mine.yaml\nshots: 3\n")  # beside it, not here
    task = find_task(str(tmp_path / "below.yaml"))
    assert (task.delimiter, task.shots) == ("", 3)
    file.write_text("base: gsm8k\ngenerate: {n: 8, temperature: 1}\n")
    assert find_task(str(file)).metrics == ("exact_match", "flexible_match", "maj@8")


def test_another_metric():
    task = select_metric(find_task("boolq"), "acc_uncond")
    assert (task.headline, task.metrics) == ("acc_uncond", ("acc", "acc_uncond"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: piqa\nprompts: a", "'prompts'; near it: prompt"),
        ("base: piqa\nkind: choices", "'choices' is none of choice, generate"),
        ("base: piqa\nmetrics: [acc, acc_nrom]", "'acc_nrom' is none of acc, acc_norm"),
        ("base: piqa\nheadline: mc1", "headline 'mc1' is none of its metrics, acc, acc_norm"),
        ("base: piqa\ndata: [{tets: a}]", "'tets'; near it: test"),
        ("name: mine\nkind: text", "has no about, data, metrics, headline"),
        ("base: hellaswg", "there is no task 'hellaswg'.* hellaswag"),
        ("base: mine.yaml", "mine.yaml has itself as its base"),
        ("base: [piqa]", r"has base = \['piqa'\], expected the name"),
        ("base: piqa\ndata: [{shots: x}]", "data, has {'shots': 'x'} without test"),
        ("base: piqa\ndata: x", "has data = 'x', expected a list of keys and values"),
        ("base: piqa\ndata: [{test: 3}]", "data has test = 3, expected a text"),
        ("base: piqa\nshots: five", "has shots = 'five', expected a whole number"),
        ("base: piqa\nshots: yes", "has shots = True, expected a whole number"),
        ("base: piqa\nchoices: [yes, no]", "expected a text or a list of texts"),
        ("base: mmlu\ncategories: {a: b}", "expected keys and lists of texts"),
        ("base: gsm8k\ngenerate: {until: x}", "generate has until = 'x', expected a list of text"),
        ("base: gsm8k\ngenerate: {temperature: hot}", "temperature = 'hot', expected a number"),
        ("base: gsm8k\nmetrics: [acc]", "'acc' is none of exact_match, flexible_match$"),
        ("base: gsm8k\nmetrics: [maj@5]", "'maj@5' is none of exact_match, flexible_match$"),
        ("base: gsm8k\nnormaliser: numbr", "'numbr' is none of harness, harness_nq, llama, number"),
        ("base: gsm8k\nnormaliser: llama", "'flexible_match' is none of exact_match$"),
        ("base: piqa\nnormaliser: llama", "a normaliser is for kind generate, not choice"),
        ("base: wikitext\nmetrics: [acc]", "'acc' is none of bits_per_byte, byte_perplexity"),
        ("base: mt_bench\nmetrics: [wrds]", "'wrds' is none of words"),
        ("base: mbpp\ncode: {}", "expected `code: {program: TEXT}`"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_wrong_files(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        find_task(str(file))


def test_missing_data(tmp_path):
    where = f"{tmp_path}/piqa/valid.jsonl, which is not there: it is published at https://yonatan"
    with pytest.raises(ValueError, match=f"{where}.*`tfds build piqa --file_format=array_record"):
        make_items(find_task("piqa"), str(tmp_path))
    write(tmp_path, {"piqa/valid.jsonl": lines(PIQA), "piqa/valid-labels.lst": "1\n0\n"})
    with pytest.raises(ValueError, match="valid-labels.lst has 2 labels for 1 documents"):
        make_items(find_task("piqa"), str(tmp_path))
    with pytest.raises(ValueError, match="needs .*piqa/train.jsonl, which is not there"):
        make_items(find_task("piqa"), str(tmp_path), shots=1)
    with pytest.raises(ValueError, match="mmlu has 5 documents for 6 shots: ask fewer"):
        make_items(find_task("mmlu"), SLICES, shots=6)
    with pytest.raises(ValueError, match="truthfulqa has no data to take shots from"):
        make_items(find_task("truthfulqa"), SLICES, shots=1)
    write(tmp_path, {"boolq/val.jsonl": lines({"passage": "a", "label": 0})})
    with pytest.raises(ValueError, match="task boolq, val.jsonl:1.*'question' is undefined"):
        make_items(find_task("boolq"), str(tmp_path))


def test_templates_are_in_a_sandbox(tmp_path):
    write(tmp_path, {"a.jsonl": lines({"text": "a"})})
    task = find_task(f"text:{tmp_path}/a.jsonl")
    for attack in ("{{ text.__class__.__mro__ }}", "x{{ ''.__class__ }}"):
        with pytest.raises(ValueError, match="cannot be filled|is nothing"):
            make_items(dataclasses.replace(task, prompt=attack), str(tmp_path))


def test_no_id_is_given_twice(tmp_path):
    write(tmp_path, {"a.jsonl": lines({"text": "a"}, {"text": "b"}, {"text": "a"})})
    task = dataclasses.replace(find_task(f"text:{tmp_path}/a.jsonl"), id="{{ text }}")
    with pytest.raises(ValueError, match="a.jsonl:3, has the id 'a' as .*a.jsonl:1 does"):
        make_items(task, str(tmp_path), limit=1)
