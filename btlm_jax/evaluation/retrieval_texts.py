"""Prompts with an answer far back: records of lines, and conversations on topics.

They follow LongEval (Li et al., 2023, "How long can open-source LLMs truly promise on context
length?") and use its instructions and questions; but conversations are assembled from stock
sentences, while a language model wrote LongEval's. Everything follows from a seed, through
`random.Random.random` alone, whose numbers Python promises not to change.
"""

from __future__ import annotations

import itertools
import random
from typing import Literal, NamedTuple

RetrievalTask = Literal["lines", "topics"]


def _split_list(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(",")]


_ADJECTIVES = _split_list("""
    able, acid, agile, amber, ample, aware, basic, black, blank, blunt, bold, brave, brief,
    bright, broad, brown, calm, cheap, civil, clean, clear, close, cold, cool, crisp, cruel,
    curly, daily, damp, dark, dear, deep, dense, dim, dizzy, dry, dull, eager, early, easy,
    empty, equal, exact, faint, fair, false, famous, fast, fierce, final, firm, flat, fond,
    frail, free, fresh, full, funny, gentle, giant, glad, gold, grand, grave, gray, great,
    green, grim, happy, hardy, harsh, heavy, hollow, honest, huge, humble, icy, ideal, jolly,
    keen, kind, large, late, lazy, light, little, lively, lonely, loose, loud, lucky, mad,
    major, merry, mild
""")
_NOUNS = _split_list("""
    actor, anchor, apple, arrow, badge, baker, ball, banana, barn, basin, basket, beach, beetle,
    bell, berry, bishop, blanket, boat, bottle, bowl, branch, bread, brick, bridge, broom,
    bucket, button, cabin, cable, camel, candle, canoe, carpet, castle, cellar, chain, chair,
    cherry, circle, cloud, coast, coin, comet, copper, corner, cotton, cousin, crayon, cricket,
    crown, curtain, dancer, desert, diamond, donkey, dragon, drum, eagle, engine, falcon,
    farmer, feather, fiddle, finger, flower, forest, fountain, garden, ginger, glove, goose,
    guitar, hammer, harbor, hotel, island, jacket, jewel, kettle, kitchen, ladder, lantern,
    lemon, letter, lizard, magnet, marble, market, meadow, mirror, monkey, mountain, napkin,
    needle, ocean, orange
""")
_ASPECTS = _split_list("""
    history, future, economics, science, psychology, philosophy, politics, teaching, design,
    cost, benefits, dangers, ethics, beauty, origins, decline, geography, craft, language, law
""")
_SUBJECTS = _split_list("""
    volunteering, jazz music, space travel, urban gardening, chess, coffee, public transport,
    marathons, bird watching, pottery, wind power, photography, mountain climbing, public
    libraries, beekeeping, board games, sleep, sailing, cheese making, robotics, street art, tea
    ceremonies, film editing, foreign languages, long walks, bread baking, museums, swimming,
    weather forecasts, knitting, bicycles, lighthouses, opera, cave exploration, farmers
    markets, sign language, skiing, old maps, clock making, tropical fish, circus schools,
    poetry, bridges, recycling, volcanoes, dance, radio plays, gliders
""")
_REQUESTS = (
    "What should a beginner know about it?", "Why do so many people care about it?",
    "Can you tell me something surprising about it?", "How has it changed in recent years?",
    "What would you say to someone who doubts it?", "Where would I find out more?",
    "Which mistakes do people often make?", "What do experts disagree on?",
)  # fmt: skip
_OPENINGS = (
    "That is a good question.", "There is a lot to say here.", "Let me think about that.",
    "I am glad that you ask.", "Many people wonder about this.", "It is worth a closer look.",
)  # fmt: skip
_REMARKS = (
    "Most of what matters can be learned in small steps, with patience and regular practice.",
    "Much depends on where you live, on the season, and on who you can ask for help.",
    "People who have done it for years say that the first month is the hardest.",
    "A century ago hardly anyone would have expected it to become so widespread.",
    "The evidence is mixed, and careful studies have been published only recently.",
    "It helps to keep notes, to compare them with those of others, and to start again.",
    "Some of the best accounts were written by amateurs who simply kept watching.",
    "Costs have come down a great deal, which has brought in a younger crowd.",
    "What looks simple from outside turns out to rest on many quiet decisions.",
    "Clubs and evening classes are a good way to meet others who share the interest.",
)  # fmt: skip

# Maximum number of lines or topics of a prompt.
MAX_ENTRIES = {
    "lines": len(_ADJECTIVES) * len(_NOUNS), "topics": len(_ASPECTS) * len(_SUBJECTS)
}  # fmt: skip


class RetrievalText(NamedTuple):
    """The text of a prompt, and its answer."""

    prompt: str
    answer: str  # a number, or a topic
    others: tuple[str, ...]  # the other numbers or topics; none contains another
    lead: bool  # whether the prompt ends with the beginning of the answer


class RetrievalRecord:
    """Entries for prompts of any size; larger prompts contain the entries of smaller ones.

    Args:
      task: "lines" asks for the number in one line of a record, "topics" for the first topic of a
        conversation.
      seed: seed of a series of records.
      index: index in the series.
      lead: end prompts with the beginning of the answer, which models that were not trained to
        answer questions need; LongEval does not.
    """

    def __init__(self, task: RetrievalTask, seed: int, index: int, *, lead: bool = True) -> None:
        self._task, self._lead = task, lead
        rng = random.Random(f"{task} {seed} {index}")
        self._fraction = rng.random()
        if task == "lines":
            pairs = [f"{a}-{b}" for a, b in itertools.product(_ADJECTIVES, _NOUNS)]
            numbers = _shuffled(range(10_000, 100_000), rng)
            self._entries = [*zip(_shuffled(pairs, rng), map(str, numbers), strict=False)]
        else:
            topics = [f"the {a} of {s}" for a, s in itertools.product(_ASPECTS, _SUBJECTS)]
            self._entries = [(topic, _conversation(rng)) for topic in _shuffled(topics, rng)]

    def text(self, size: int) -> RetrievalText:
        """Returns the prompt with `size` lines or topics, from 1 to `MAX_ENTRIES`.

        The question is about the same line at every size, at the same fraction of the record.
        """
        return self._lines_text(size) if self._task == "lines" else self._topics_text(size)

    def _lines_text(self, size: int) -> RetrievalText:
        target, number = self._entries[0]
        entries = self._entries[1:size]
        entries.insert(int(self._fraction * size), (target, number))
        lines = "".join(f"line {name}: REGISTER_CONTENT is <{n}>\n" for name, n in entries)
        prompt = (
            "Below is a record of lines I want you to remember. Each line begins with 'line <line "
            "index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical "
            "value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end "
            "of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
            f"certain line index. Now the record start:\n\n{lines}\nNow the record is over. Tell "
            f"me what is the <REGISTER_CONTENT> in line {target}? I need the number."
        )
        prompt += f"\nline {target}: REGISTER_CONTENT is <" if self._lead else ""
        return RetrievalText(
            prompt, number, tuple(n for _, n in entries if n != number), self._lead
        )

    def _topics_text(self, size: int) -> RetrievalText:
        entries = self._entries[:size]
        record = "".join(
            f"USER: I would like to discuss the topic of {topic}.\n{conversation}"
            for topic, conversation in entries
        )
        prompt = (
            f"Below is a record of our previous conversation on {size} different topics. You are "
            "the ASSISTANT, and I am the USER. At the beginning of each topic, the USER will say "
            "'I would like to discuss the topic of <TOPIC>'. Memorize each <TOPIC>. At the end of "
            "the record, I will ask you to retrieve the first topic. Now the record start.\n"
            f"{record}USER: What is the first topic we discussed? Only give me the topic name. Do "
            "not summarize yourself.\nASSISTANT:"
        )
        prompt += " The first topic we discussed is" if self._lead else ""
        (answer, _), *others = entries
        return RetrievalText(prompt, answer, tuple(topic for topic, _ in others), self._lead)


def _conversation(rng: random.Random) -> str:
    turns = ["ASSISTANT: Sure, what would you like to know?\n"]
    for request in _shuffled(_REQUESTS, rng)[:2]:
        opening, *_ = _shuffled(_OPENINGS, rng)
        remarks = " ".join(_shuffled(_REMARKS, rng)[:3])
        turns.append(f"USER: {request}\nASSISTANT: {opening} {remarks}\n")
    return "".join(turns)


def _shuffled(items, rng: random.Random) -> list:
    return sorted(items, key=lambda _: rng.random())
