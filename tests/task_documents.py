"""A few questions of each task, written for these tests, as the hub's data sets have them."""

from typing import Any

_ARC = [
    ("What falls from a cloud?", ["rain", "a stone", "a chair", "sand"], 0),
    ("Which animal can fly?", ["a horse", "a crow", "a snail"], 1),
    ("What do plants need to grow?", ["darkness", "noise", "paint", "light"], 3),
    ("What melts when it is warm?", ["iron", "ice", "glass", "wood"], 1),
    ("What is used to measure time?", ["a clock", "a fork", "a shoe", "a lamp"], 0),
    ("Where do fish live?", ["in trees", "in water", "in books", "on the moon"], 1),
]


def _lettered(choices: list[str], right: int) -> dict[str, Any]:
    letters = "ABCDE"[: len(choices)]
    return {"choices": {"text": choices, "label": list(letters)}, "answerKey": letters[right]}


DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [{"question": q, **_lettered(c, r)} for q, c, r in _ARC],
    "arc_challenge": [{"question": q, **_lettered(c, r)} for q, c, r in reversed(_ARC)],
    "openbookqa": [{"question_stem": q.rstrip("?"), **_lettered(c, r)} for q, c, r in _ARC],
    "piqa": [
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the table", "label": 0},
        {"goal": "How do I warm milk?", "sol1": "In a hat.", "sol2": "In a pot.", "label": 1},
        {"goal": "dry a towel", "sol1": "hang it up", "sol2": "put it in a pond", "label": 0},
        {"goal": "cut paper", "sol1": "with a spoon", "sol2": "with scissors", "label": 1},
    ],
    "boolq": [
        {"passage": "Snow is frozen water.", "question": "is snow made of water", "label": 1},
        {"passage": "The shop\n\nopens at nine.", "question": "is it open at six", "label": 0},
        {"passage": "Question: who knows?", "question": "is anything said here", "label": 0},
    ],
    "winogrande": [
        {
            "sentence": "The cup did not fit into the box because the _ was too big.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
        {
            "sentence": "Anna thanked Anne because _ had helped.",
            "option1": "Anna",
            "option2": "Anne",
            "answer": "2",
        },
        {
            "sentence": "_ was older than Ben, so Tom went first.",
            "option1": "Tom",
            "option2": "Ben",
            "answer": "1",
        },
    ],
    "lambada_openai": [
        {"text": "The sun was hot and the road was long, and still he walked along the road"},
        {"text": '"Where is my dog?" she asked.\n\nNobody had seen the dog'},
        {"text": "He looked at the sea, at the wide green sea"},
    ],
    "hellaswag": [
        {
            "activity_label": "Washing a car",
            "ctx_a": "A man fills a bucket. He takes a sponge.",
            "ctx_b": "he",
            "endings": ["wipes the door.", "eats it.", "sings to the sea.", "flies."],
            "label": "0",
        },
        {
            "activity_label": "Baking: bread",
            "ctx_a": "[header] How to bake [title] Mix flour and water.  Let it rest.",
            "ctx_b": "",
            "endings": ["[step] Sell it.", "Bake it.", "Read it.", "Hide it."],
            "label": "1",
        },
        {
            "activity_label": "Rowing",
            "ctx_a": "Two boats are on a lake.",
            "ctx_b": "the people in the boats",
            "endings": ["row.", "melt.", "are paper.", "boil an egg."],
            "label": "0",
        },
    ],
}
"""Some have three choices, brackets, a passage with blank lines, answers in capitals: what breaks a
conversion."""


def query_and_gold(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The other form of a row, as other suites write it."""
    if name in ("arc_easy", "arc_challenge", "openbookqa"):
        question = row["question_stem"] if name == "openbookqa" else f"Question: {row['question']}"
        gold = row["choices"]["label"].index(row["answerKey"])
        return {"query": question, "choices": row["choices"]["text"], "gold": gold}
    if name == "piqa":
        query = f"Question: {row['goal']}\n"
        return {"query": query, "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}
    if name == "boolq":
        query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
        return {"query": query, "choices": ["no", "yes"], "gold": row["label"]}
    if name == "winogrande":
        before, _, after = row["sentence"].partition("_")
        options = [f"{before}{row[option]}" for option in ("option1", "option2")]
        gold = int(row["answer"]) - 1
        return {"context_options": options, "continuation": after.strip(), "gold": gold}
    if name == "lambada_openai":
        context, _, word = row["text"].rpartition(" ")
        return {"context": context, "continuation": word}
    context = " ".join(part for part in (row["ctx_a"], row["ctx_b"]) if part)
    query = f"{row['activity_label']}: {context}"
    return {"query": query, "choices": row["endings"], "gold": int(row["label"])}
