"""A small grammar of children's stories, the source of every text in the demo.

A story is drawn in three paragraphs: who, where and in what weather; a problem from one of the
plots; and how the day ended. What a story states early (a name, a count, a color, an animal, the
weather) decides words much later, so a model has to carry it along.

The words and the sentences are in the tables next to this module. The order of the draws counts as
much as theirs: every text follows from its seed alone, byte for byte.
"""

import random
import re
from collections.abc import Callable, Sequence

import story_tables as tables

# Name, seed and least number of bytes of the texts that come with the package.
DEMO_TEXTS = (("calibration.txt", 101, 250_000), ("evaluation.txt", 202, 125_000))


def number(value: int) -> str:
    """Spell a number between 0 and 99."""
    if value < 20:
        return tables.UNITS[value]
    tens, ones = tables.TENS[value // 10 - 2], value % 10
    return f"{tens}-{tables.UNITS[ones]}" if ones else tens


def plural(noun: str) -> str:
    """Return the plural of a noun of the tables."""
    irregular = {"leaf": "leaves", "potato": "potatoes"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")


def counted(value: int, noun: str) -> str:
    """Join a spelled number and its noun, as in ``one pear`` or ``two pears``."""
    return f"{number(value)} {noun if value == 1 else plural(noun)}"


class Facts(dict[str, str]):
    """The facts of a story; a capitalized key gives the capitalized value."""

    def __missing__(self, key: str) -> str:
        lower = key[0].lower() + key[1:]
        if lower == key:
            raise KeyError(key)
        return self[lower][0].upper() + self[lower][1:]


class Tale:
    """A story while it is being told.

    Attributes:
        rng: The only source of chance.
        facts: What the story has settled so far.
        text: The text told so far.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.facts = Facts()
        self.text = ""

    def settle(self, **facts: str | int) -> None:
        """Settle facts; numbers are spelled."""
        for name, fact in facts.items():
            self.facts[name] = number(fact) if isinstance(fact, int) else fact

    def pick(self, table: Sequence[str | list[str]], *names: str) -> None:
        """Draw a row (or a word) and settle its columns as facts of these names."""
        row = self.rng.choice(table)
        self.facts.update(zip(names, [row] if isinstance(row, str) else row, strict=True))

    def pick_many(self, words: Sequence[str], *names: str) -> None:
        """Draw as many different words as there are names."""
        self.facts.update(zip(names, self.rng.sample(words, len(names)), strict=True))

    def say(self, sentences: Sequence[str]) -> None:
        """Add sentences, leaving out half of those that start with a question mark."""
        for template in sentences:
            if template.startswith("?") and self.rng.random() < 0.5:
                continue
            sentence = self.expand(template.removeprefix("?"))
            gap = "" if not self.text or self.text.endswith("\n") else " "
            self.text += gap + sentence[0].upper() + sentence[1:]

    def expand(self, template: str) -> str:
        """Draw the alternatives from the inside out, then fill in the facts."""
        while match := re.search(r"\[([^\[\]]*)\]", template):
            chosen = self.rng.choice(match[1].split("|"))
            template = template[: match.start()] + chosen + template[match.end() :]
        filled = template.format_map(self.facts)
        filled = re.sub(r'(^| )"[a-z]', lambda match: match[0].upper(), filled)
        return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", filled)


def _child(tale: Tale, name: str, prefix: str) -> None:
    """Settle the name of a child, other than the hero's, and its pronouns under a prefix."""
    girl = tale.rng.random() < 0.5
    names = tables.GIRLS if girl else tables.BOYS
    tale.pick([other for other in names if other != tale.facts.get("hero")], name)
    pronouns = ("she", "her", "her", "girl") if girl else ("he", "him", "his", "boy")
    keys = [prefix + key for key in ("he", "him", "his", "kid")]
    tale.facts.update(zip(keys, pronouns, strict=True))


def _cast(tale: Tale) -> None:
    """Settle the hero, the friend and one grown-up or relative."""
    _child(tale, "hero", "")
    _child(tale, "friend", "f")
    tale.pick(tables.FAMILY, "elder", "ehe", "ehim", "ehis")
    tale.pick_many(tables.TRAITS, "trait", "ftrait")
    tale.pick(tables.FEELINGS, "feeling", "reaction", "relief", "joy")
    reaction, his, friends = (tale.facts[key] for key in ("reaction", "his", "fhis"))
    tale.settle(reaction=reaction.format(his=his), freaction=reaction.format(his=friends))


def _scene(tale: Tale) -> None:
    """Settle where and when the story happens, in what weather, and the hero's age."""
    tale.pick(tables.PLACES, "place", "sights", "ground", "horizon")
    tale.pick(tables.WEATHERS, "weather", "sky", "wear", "sense", "change")
    tale.pick(tables.COLORS, "wearcolor")
    tale.pick(tables.DAYS, "day")
    age = tale.rng.randint(4, 12)
    one, many = tale.rng.sample(tale.facts["sights"].split(", "), 2)
    tale.settle(age=age, nextage=age + 1, sight=one, sights=plural(many))


def _lost(tale: Tale) -> None:
    """Tell of something that goes missing and turns up in the last of the places searched."""
    tale.pick(tables.TOYS, "thing")
    tale.pick(tables.COLORS, "color")
    tale.pick_many(tables.SPOTS, "at0", "at1", "at2")


def _count(tale: Tale) -> None:
    """Tell of things that are found and given away, and the sums come out right."""
    tale.pick(tables.TREASURES, "item")
    item = tale.facts["item"]
    start, more = tale.rng.randint(2, 9), tale.rng.randint(2, 9)
    total = start + more
    given = tale.rng.randint(1, total - 2)
    tale.settle(items=plural(item), start=counted(start, item), more=more)
    tale.settle(total=counted(total, item), left=counted(total - given, item))
    tale.settle(given=counted(given, item), had=given)


def _repair(tale: Tale) -> None:
    """Tell of something broken, which the right helper mends with the right tool."""
    tale.pick(tables.REPAIRS, "thing", "damage", "tool", "worker", "mended", "used")
    tale.pick(tables.COLORS, "color")


def _animal(tale: Tale) -> None:
    """Tell of a hurt animal that is fed what it likes and brought home."""
    tale.pick(tables.ANIMALS, "animal", "food", "sound", "home", "part")
    tale.pick(tables.COLORS, "color")
    tale.pick(tables.PETS, "pet")


def _cook(tale: Tale) -> None:
    """Tell of a dish that is cooked from its own ingredients and shared out."""
    tale.pick(tables.DISHES, "dish", "needs", "did", "vessel", "server")
    tale.pick_many(tale.facts["needs"].split(", "), "need0", "need1", "need2")
    guests = tale.rng.randint(2, 9)
    tale.settle(guests=guests, served=counted(guests + 2, tale.facts["server"]))


def _fear(tale: Tale) -> None:
    """Tell of something frightening that turns out to be harmless."""
    tale.pick(tables.FEARS, "scare", "where", "truth")
    tale.pick(tables.TOYS, "thing")


def _swap(tale: Tale) -> None:
    """Tell of a chain of trades that is told again, in order, at its end."""
    tale.pick_many(tables.TOYS, "a0", "a1", "a2", "a3")
    tale.pick_many(tables.TRADERS, "m0", "m1")
    tale.pick_many(tables.COLORS, "c0", "c3")


def _shop(tale: Tale) -> None:
    """Tell of coins that are spent, and the change is right."""
    tale.pick_many(tables.TOYS, "thing", "other")
    tale.pick(tables.SELLERS, "seller")
    price, rest = tale.rng.randint(2, 15), tale.rng.randint(1, 15)
    second = tale.rng.randint(rest + 1, rest + 6)
    tale.settle(purse=counted(price + rest, "coin"), price=counted(price, "coin"))
    tale.settle(rest=counted(rest, "coin"), second=counted(second, "coin"))
    tale.settle(gap=counted(second - rest, "coin"))


def _paint(tale: Tale) -> None:
    """Tell of two paints that run together and make a third."""
    tale.pick(tables.MIXES, "c0", "c1", "c2")
    tale.pick_many(tables.PICTURES, "picture", "other")


def _journey(tale: Tale) -> None:
    """Tell of a trip with a mishap, a number of miles and a welcome."""
    tale.pick(tables.RIDES, "ride", "moved", "trouble", "cure")
    total, done = tale.rng.randint(12, 40), tale.rng.randint(2, 10)
    tale.pick(tables.TOYS, "gift")
    tale.settle(total=total, done=counted(done, "mile"), rest=total - done)


def _race(tale: Tale) -> None:
    """Tell of a race whose order is told and then used."""
    runners = tale.rng.sample([row[0] for row in tables.ANIMALS], 4)
    order = tale.rng.sample(runners, 4)
    tale.settle(**{f"r{at}": runner for at, runner in enumerate(runners)})
    tale.settle(**{f"w{at}": runner for at, runner in enumerate(order)})
    tale.pick(tables.PRIZES, "prize")
    tale.pick(tables.RANKS, "rank")
    tale.settle(ranked=order[tables.RANKS.index(tale.facts["rank"])])


def _grow(tale: Tale) -> None:
    """Tell of seeds that grow day by day, and pests take their share."""
    tale.pick(tables.PLANTS, "plant")
    tale.pick(tables.PESTS, "pest")
    plant, today = tale.facts["plant"], tables.DAYS.index(tale.facts["day"])
    tale.settle(day1=tables.DAYS[(today + 1) % 7], day2=tables.DAYS[(today + 2) % 7])
    seeds, eaten = tale.rng.randint(5, 19), tale.rng.randint(1, 4)
    tale.settle(seeds=counted(seeds, "seed"), left=counted(seeds - eaten, plant))
    tale.settle(eaten=eaten, plants=plural(plant))


PLOTS: dict[str, Callable[[Tale], None]] = {
    "lost": _lost,
    "count": _count,
    "repair": _repair,
    "animal": _animal,
    "cook": _cook,
    "fear": _fear,
    "swap": _swap,
    "shop": _shop,
    "paint": _paint,
    "journey": _journey,
    "race": _race,
    "grow": _grow,
}


def story(rng: random.Random) -> str:
    """Tell one story.

    Args:
        rng: The source of chance; equal states tell equal stories.

    Returns:
        Three paragraphs, one per line, without a newline at the end.
    """
    tale = Tale(rng)
    plot = rng.choice(list(PLOTS))
    _cast(tale)
    _scene(tale)
    tale.say(tables.OPENING)
    tale.text += "\n"
    PLOTS[plot](tale)
    tale.say(tables.SENTENCES[plot])
    tale.text += "\n"
    tale.settle(moral=tables.MORALS[plot])
    tale.say(tables.ENDING)
    return tale.text


def write_stories(seed: int, size: int, taken: set[str]) -> list[str]:
    """Tell stories until they fill a number of bytes.

    Args:
        seed: Seed of the stories.
        size: Number of bytes to fill; the last story may run over.
        taken: Stories that must not be told again; the new ones are added to it.

    Returns:
        The stories, all different.
    """
    rng = random.Random(seed)
    stories: list[str] = []
    filled = 0
    while filled < size:
        told = story(rng)
        if told not in taken:
            taken.add(told)
            stories.append(told)
            filled += len(told) + 2
    return stories


def demo_texts(taken: set[str]) -> dict[str, str]:
    """Write the texts that come with the package.

    Args:
        taken: Stories that must not be told again; those of the texts are added to it.

    Returns:
        The texts by file name, with a blank line between their stories.
    """
    return {
        name: "\n\n".join(write_stories(seed, size, taken)) + "\n"
        for name, seed, size in DEMO_TEXTS
    }
