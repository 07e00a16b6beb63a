"""Writes synthetic reviews in Chinese and English, and a vocabulary for them.

    python script/quickstart/make_reviews.py FOLDER [--seed 7]

FOLDER gets train.tsv (4,000 rows), dev.tsv (800), test.tsv (800) with the columns `label` and `text_a`,
and vocab.txt. A review praises or blames one thing; three in ten judgements are negated ("not bad"), and
where two clauses disagree the one after "but" decides, so that counting words is not enough.
One label in 25 is wrong, so that nobody can be right about all. No text stands in two files.
"""

from __future__ import annotations

import argparse
import random
import unicodedata
from pathlib import Path

SIZES = {"train": 4000, "dev": 800, "test": 800}
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]

ENGLISH = {
    "topics": ["hotel", "phone", "laptop", "restaurant", "movie", "book", "camera", "flat", "course"],
    "aspects": ["service", "price", "quality", "design", "staff", "story", "location", "support"],
    "good": ["good", "great", "lovely", "excellent", "pleasant", "friendly", "reliable", "superb"],
    "bad": ["bad", "poor", "awful", "terrible", "rude", "boring", "broken", "dirty"],
    "plain": ["The {aspect} of this {topic} is {word}", "We found the {aspect} {word}", "{aspect}: {word}"],
    "negated": ["The {aspect} of this {topic} is not {word}", "We did not find the {aspect} {word} at all"],
    "joined": ["{first}, but {second}", "Although {first}, {second}", "{first}. Still, {second}"],
    "end": [".", "!", ""],
}
CHINESE = {
    "topics": ["酒店", "手机", "电脑", "餐厅", "电影", "小说", "相机", "房间", "课程", "快递"],
    "aspects": ["服务", "价格", "质量", "设计", "态度", "包装", "情节", "位置", "售后"],
    "good": ["好", "满意", "出色", "舒服", "漂亮", "可靠", "热情", "精彩"],
    "bad": ["差", "糟糕", "失望", "难受", "粗糙", "无聊", "冷淡", "脏"],
    "plain": ["这家{topic}的{aspect}很{word}", "{topic}的{aspect}让人觉得{word}", "{aspect}非常{word}"],
    "negated": ["这家{topic}的{aspect}不{word}", "{topic}的{aspect}一点也不{word}", "{aspect}并不{word}"],
    "joined": ["{first}，但是{second}", "虽然{first}，不过{second}", "{first}。然而{second}"],
    "end": ["。", "！", ""],
}


def clause(language: dict[str, list[str]], positive: bool, rng: random.Random) -> str:
    """One judgement of the wanted polarity; three in ten say it by negating the opposite."""
    negated = rng.random() < 0.3
    word = rng.choice(language["good" if positive != negated else "bad"])
    pattern = rng.choice(language["negated" if negated else "plain"])
    topic, aspect = rng.choice(language["topics"]), rng.choice(language["aspects"])
    return pattern.format(topic=topic, aspect=aspect, word=word)


def review(rng: random.Random) -> tuple[int, str]:
    """A label (1 praises) and a text."""
    language = rng.choice([ENGLISH, CHINESE])
    positive = rng.random() < 0.5
    text = clause(language, positive, rng)
    if rng.random() < 0.4:
        first = clause(language, not positive, rng)
        text = rng.choice(language["joined"]).format(first=first, second=text)
    stars_slipped = rng.random() < 0.04
    return int(positive != stars_slipped), text + rng.choice(language["end"])


def pieces(text: str) -> set[str]:
    """The words and characters that a WordPiece tokenizer can cut a text into, lower-cased."""
    found: set[str] = set()
    word = ""
    for character in text.lower() + " ":
        if character.isascii() and character.isalnum():
            word += character
            continue
        found.add(word)
        word = ""
        if not character.isspace():
            found.add(unicodedata.normalize("NFC", character))
    return found - {""}


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows: dict[str, int] = {}
    while len(rows) < sum(SIZES.values()):
        label, text = review(rng)
        rows.setdefault(text, label)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = iter(rows.items())
    vocabulary: set[str] = set()
    for name, size in SIZES.items():
        with open(args.folder / f"{name}.tsv", "w", encoding="utf-8", newline="\n") as file:
            file.write("label\ttext_a\n")
            for text, label in (next(lines) for _ in range(size)):
                file.write(f"{label}\t{text}\n")
                if name == "train":
                    vocabulary |= pieces(text)
    tokens = [*SPECIAL, *sorted(vocabulary)]
    (args.folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), "utf-8")


if __name__ == "__main__":
    main()
