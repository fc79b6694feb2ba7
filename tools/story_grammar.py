"""A small grammar of children's stories, the source of every text in the demo.

A story is drawn in three paragraphs: who, where and in what weather; a problem from one of the
plots; and how the day ended. What a story states early (a name, a count, a color, an animal, the
weather) decides words much later, so a model has to carry it along.

Templates use two marks: ``[a|b|c]`` stands for one of the alternatives, which may nest, and
``{fact}`` for something the story knows; ``{Fact}`` is the same with a capital. A template that
starts with ``?`` is left out half of the time.
"""

import random
import re
from collections.abc import Callable, Sequence


def _rows(table: str) -> list[list[str]]:
    """Splits a table with one row per line and ``|`` between its columns."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def _phrases(text: str) -> list[str]:
    """Splits a list of phrases at its semicolons."""
    return [" ".join(phrase.split()) for phrase in text.split(";")]


def _words(text: str) -> list[str]:
    """Splits a list of words at its blanks."""
    return text.split()


GIRLS = _words("""
Ada Alice Amy Anna Bella Bess Carla Clara Daisy Dora Edith Ella Emma Fay Flora Gina Grace Greta Hana
Hazel Holly Ida Iris Ivy Jane Joan Julia June Kate Kira Laura Lena Lily Lucy Mara Maya Mia Mina
Molly Nadia Nell Nina Nora Olga Olive Pia Polly Rita Rosa Ruby Sara Sofia Stella Tara Tess Vera
Wanda Willa Yara Zoe
""")

BOYS = _words("""
Abel Adam Alan Amos Axel Ben Boris Bruno Carl Colin Dan David Dean Emil Eric Felix Finn Frank Fred
George Gus Hans Henry Hugo Ian Igor Ivan Jack Jacob Jim Joel Karl Ken Leo Liam Luke Marco Mark Max
Milo Ned Nick Noah Oscar Otto Owen Paul Pete Ralph Ravi Rob Sam Simon Theo Tim Toby Tom Victor Walt
Will
""")

COLORS = _words("""
red blue green yellow purple orange white black brown gray pink golden silver
""")

TRAITS = _words("""
brave quiet curious gentle cheerful shy clever stubborn careful patient noisy dreamy polite messy
sleepy kind bold funny honest serious playful thoughtful
""")

TOYS = _words("""
kite ball drum doll train robot puzzle whistle yo-yo rocket puppet teddy truck marble lantern
compass flute scarf mitten notebook pencil umbrella crown ribbon button necklace bracelet medal
magnet hat boot spoon bell key locket stamp mask candle basket blanket
""")

TREASURES = _words("""
shell pebble feather acorn leaf stone berry apple pear plum cherry nut mushroom flower egg coin bead
seed pinecone peach lemon potato carrot pumpkin cookie stick daisy tulip
""")

SPOTS = _phrases("""
under the bed; behind the curtain; inside the cupboard; on top of the shelf; under the stairs; in
the laundry basket; behind the stove; between the cushions; in the toy chest; beside the fireplace;
under the kitchen table; in the garden shed; behind the rain barrel; inside the mailbox; under the
porch; in the wheelbarrow; beneath the old oak; in the dog house; on the windowsill; inside the
piano
""")

PLACES = _rows("""
at the beach | wave, gull, crab, sail | sand | the sea
in the forest | pine, fern, squirrel, owl | moss | the tall trees
on the farm | barn, tractor, fence, rooster | straw | the fields
in the park | bench, swing, fountain, pigeon | grass | the old gate
by the river | bridge, reed, otter, canoe | mud | the water
on the mountain | cliff, goat, cave, eagle | rock | the peak
in the city | tower, tram, shop, lamp | pavement | the rooftops
in the village | well, chapel, cottage, cart | cobbles | the square
at the harbor | ship, anchor, rope, sailor | planks | the lighthouse
in the meadow | bee, butterfly, poppy, lamb | clover | the hills
in the desert | cactus, camel, lizard, tent | dust | the dunes
by the lake | swan, island, raft, lily | gravel | the far shore
in the garden | rose, snail, hedge, beehive | soil | the flower beds
at the castle | knight, flag, stable, moat | marble | the high walls
in the valley | stream, sheep, mill, orchard | heather | the slopes
""")

WEATHERS = _rows("""
sunny | the sun shone from a clear sky | straw hat | hot | the sun went down in a red sky
rainy | rain fell from dark clouds | raincoat | wet | the rain stopped and a rainbow came out
snowy | snow covered everything | wool coat | cold | the snow glittered under the stars
windy | a strong wind shook the branches | jacket | dry | the wind grew still
foggy | thick fog hid the road | vest | damp | the fog lifted and the moon appeared
stormy | thunder rolled in the distance | cape | slippery | the storm moved away
frosty | frost painted the windows | pair of gloves | hard | the frost melted into drops
cloudy | soft clouds drifted by | sweater | cool | the clouds parted and the stars came out
""")

ANIMALS = _rows("""
duck | bread | quacked | pond | wing
cat | fish | meowed | sofa | paw
dog | a bone | barked | kennel | paw
horse | hay | neighed | stable | leg
cow | clover | mooed | barn | leg
sheep | grass | bleated | fold | leg
pig | turnips | grunted | sty | ear
hen | corn | clucked | coop | wing
mouse | cheese | squeaked | hole | tail
frog | flies | croaked | marsh | leg
owl | beetles | hooted | hollow tree | wing
wolf | meat | howled | den | paw
bear | honey | growled | cave | paw
bee | nectar | buzzed | hive | wing
donkey | thistles | brayed | yard | ear
goose | oats | honked | lake | wing
lion | steak | roared | plain | tail
snake | eggs | hissed | burrow | tail
monkey | bananas | chattered | jungle | tail
rabbit | lettuce | sniffed | warren | ear
elephant | melons | trumpeted | grove | ear
parrot | seeds | screeched | cage | wing
""")

REPAIRS = _rows("""
bicycle | the wheel was bent | wrench | mechanic | straightened | rode it
chair | a leg had snapped | hammer | carpenter | nailed | sat on it
coat | the sleeve was torn | needle | tailor | sewed | wore it
clock | the hands had stopped | screwdriver | watchmaker | wound | listened to it
boat | the hull was leaking | bucket of tar | boatman | sealed | sailed it
fence | two boards were missing | saw | farmer | cut | leaned on it
vase | it had cracked in two | pot of glue | potter | glued | filled it
window | the glass was broken | sheet of glass | builder | replaced | looked through it
shoe | the sole was loose | leather strap | cobbler | stitched | danced in it
guitar | a string had broken | new string | musician | tuned | played it
roof | three tiles had fallen | ladder | roofer | patched | slept under it
radio | a wire was loose | soldering iron | engineer | fixed | sang along with it
""")

DISHES = _rows("""
soup | onions, carrots, beans | stirred | pot | bowl
cake | flour, butter, eggs | whisked | oven | plate
salad | tomatoes, cucumbers, radishes | tossed | wooden bowl | plate
pie | apples, cinnamon, dough | rolled | oven | plate
pancakes | milk, flour, syrup | flipped | pan | plate
stew | potatoes, mushrooms, turnips | simmered | kettle | bowl
bread | yeast, flour, salt | kneaded | oven | basket
lemonade | lemons, sugar, ice | poured | jug | glass
porridge | oats, milk, honey | heated | saucepan | bowl
jam | strawberries, sugar, lemon | boiled | copper pan | jar
pizza | cheese, dough, olives | baked | oven | plate
rice | peas, corn, ginger | steamed | pan | bowl
""")

FEARS = _rows("""
a scratching noise | the attic | a branch against the glass
a tall shadow | the hallway | a coat on a hook
two shining eyes | the cellar | the neighbor's kitten
a low moan | the chimney | the wind in the bricks
a strange tapping | the kitchen | a dripping tap
a rustling sound | the bushes | a hedgehog with her babies
a pale shape | the yard | a bedsheet on the line
a rattling sound | the garage | a loose shutter
""")

MIXES = _rows("""
red | yellow | orange
blue | yellow | green
red | blue | purple
white | red | pink
black | white | gray
""")

PICTURES = _words("""
dragon castle sunset whale garden pirate volcano balloon giraffe mermaid windmill spaceship
waterfall tiger peacock
""")

FEELINGS = _rows("""
sad | cried a little | happy | laughed
worried | bit {his} lip | calm | breathed out
angry | stamped {his} foot | sorry | made peace
bored | sighed loudly | excited | clapped
lonely | sat alone | loved | gave everyone a hug
nervous | could not speak | proud | stood up tall
jealous | looked away | thankful | said thank you
tired | yawned twice | content | hummed a tune
""")

FAMILY = _rows("""
mother | she | her | her
father | he | him | his
grandmother | she | her | her
grandfather | he | him | his
aunt | she | her | her
uncle | he | him | his
sister | she | her | her
brother | he | him | his
teacher | she | her | her
""")

RIDES = _rows("""
bus | drove | the engine coughed and stopped | pushed it up the hill
train | rolled | a tree lay across the rails | dragged the trunk aside
sled | slid | it stuck in a deep drift | dug it out with a shovel
wagon | creaked along | an axle broke | tied it together with rope
canoe | glided | a paddle floated away | used a plank to row
balloon | floated | the basket sank too low | threw out bags of sand
camel | trotted | it refused to move | sang it a song
bicycle | sped along | the chain came off | put the chain back on
""")

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MORALS = _rows("""
lost | look carefully before you give up
count | sharing makes a small pile feel big
repair | a broken thing can be whole again
animal | kindness is never forgotten
cook | food tastes best among friends
fear | most scary things are harmless up close
swap | a good trade makes both sides glad
shop | it is wise to count your money
paint | mistakes can turn into something beautiful
journey | every road is shorter with a friend
race | trying hard matters more than winning
grow | good things need time
""")

_SMALL = _words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
""")
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_RANKS = _words("first second third fourth fifth")


def number(value: int) -> str:
    """Spells a number between 0 and 99."""
    if value < 20:
        return _SMALL[value]
    tens, ones = _TENS[value // 10 - 2], value % 10
    return f"{tens}-{_SMALL[ones]}" if ones else tens


def plural(noun: str) -> str:
    """Gives the plural of a noun of the tables above."""
    irregular = {"leaf": "leaves", "potato": "potatoes"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")


def counted(value: int, noun: str) -> str:
    """Joins a spelled number and its noun, as in ``one pear`` or ``two pears``."""
    return f"{number(value)} {noun if value == 1 else plural(noun)}"


class Facts(dict[str, str]):
    """What a story knows; a capitalized key gives the capitalised value."""

    def __missing__(self, key: str) -> str:
        lower = key[0].lower() + key[1:]
        if lower == key:
            raise KeyError(key)
        return self[lower][0].upper() + self[lower][1:]


class Tale:
    """One story while it is being told.

    Attributes:
        rng: The only source of chance.
        facts: What the story has settled so far.
        text: The text told so far.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.facts = Facts()
        self.text = ""

    def pick(self, table: Sequence[str | list[str]], *names: str) -> None:
        """Draws a row (or a word) and settles its columns as facts of these names."""
        row = self.rng.choice(table)
        self.facts.update(zip(names, [row] if isinstance(row, str) else row, strict=True))

    def pick_many(self, words: Sequence[str], *names: str) -> None:
        """Draws as many different words as there are names."""
        self.facts.update(zip(names, self.rng.sample(words, len(names)), strict=True))

    def say(self, *templates: str) -> None:
        """Adds sentences, leaving out half of those that start with a question mark."""
        for template in templates:
            if template.startswith("?") and self.rng.random() < 0.5:
                continue
            sentence = self.expand(template.removeprefix("?"))
            gap = "" if not self.text or self.text.endswith("\n") else " "
            self.text += gap + sentence[0].upper() + sentence[1:]

    def expand(self, template: str) -> str:
        """Draws the alternatives from the inside out, then fills in the facts."""
        while match := re.search(r"\[([^\[\]]*)\]", template):
            chosen = self.rng.choice(match[1].split("|"))
            template = template[: match.start()] + chosen + template[match.end() :]
        filled = template.format_map(self.facts)
        filled = re.sub(r'(^| )"[a-z]', lambda match: match[0].upper(), filled)
        return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", filled)


def _cast(tale: Tale) -> None:
    """Settles the hero, the friend and one grown-up or relative."""
    for role in ("", "f"):
        girl = tale.rng.random() < 0.5
        name = "friend" if role else "hero"
        names = [n for n in (GIRLS if girl else BOYS) if n != tale.facts.get("hero")]
        tale.pick(names, name)
        pronouns = ("she", "her", "her", "girl") if girl else ("he", "him", "his", "boy")
        keys = [role + key for key in ("he", "him", "his", "kid")]
        tale.facts.update(zip(keys, pronouns, strict=True))
    tale.pick(FAMILY, "elder", "ehe", "ehim", "ehis")
    tale.pick_many(TRAITS, "trait", "ftrait")
    tale.pick(FEELINGS, "feeling", "reaction", "relief", "joy")
    reaction = tale.facts["reaction"]
    tale.facts["reaction"] = reaction.format(his=tale.facts["his"])
    tale.facts["freaction"] = reaction.format(his=tale.facts["fhis"])


def _opening(tale: Tale) -> None:
    """Tells who the story is about, where it happens and in what weather."""
    tale.pick(PLACES, "place", "sights", "ground", "horizon")
    tale.pick(WEATHERS, "weather", "sky", "wear", "sense", "change")
    tale.pick(COLORS, "wearcolor")
    tale.pick(DAYS, "day")
    age = tale.rng.randint(4, 12)
    sights = tale.rng.sample(tale.facts["sights"].split(", "), 2)
    tale.facts.update(age=number(age), nextage=number(age + 1), sight=sights[0])
    tale.facts["sights"] = plural(sights[1])
    tale.say(
        "[once there was a {trait} {kid} named {hero}|{hero} was a {trait} {kid}|"
        "there lived a {trait} {kid} called {hero}|this is the story of {hero}, a {trait} {kid}], "
        "who was {age} years old.",
        "[one {weather} {day}|on a {weather} {day}|last {day}, a {weather} day], {hero} [was|stood|"
        "sat|walked] {place} with {his} [friend|neighbor|cousin] {friend}, a {ftrait} {fkid}.",
        "?[{sky}|that morning {sky}|all around them {sky}], so {hero} wore a {wearcolor} {wear}.",
        "?they [saw|watched|passed|counted] a {sight} and [some|many|a few] {sights}.",
        "?the {ground} [felt {sense}|made a funny noise] under {his} feet.",
    )


def _lost(tale: Tale) -> None:
    """Something goes missing and turns up in the last of the places searched."""
    tale.pick(TOYS, "thing")
    tale.pick(COLORS, "color")
    tale.pick_many(SPOTS, "at0", "at1", "at2")
    tale.say(
        "{hero} [reached for|looked for|wanted] {his} {color} {thing}, but it was [gone|missing].",
        "?it was a gift from {his} {elder}.",
        '"[have you seen|where is|who took] my {thing}?" asked {hero}.',
        "{he} felt {feeling} and {reaction}.",
        "first they looked {at0}, but they found only [dust|an old sock|a spider|a cork].",
        "then {friend} looked {at1}, but the {thing} was not there [either|at all].",
        'at last {hero} peeked {at2}. "[here it is|I see it|look]!" {he} [cried|shouted|called].',
        "the {color} {thing} had been {at2} [all along|the whole time].",
        "?{friend} was glad that they had not only looked {at0} and {at1}.",
    )


def _count(tale: Tale) -> None:
    """Things are found, given away and dropped, and the sums come out right."""
    tale.pick(TREASURES, "item")
    item = tale.facts["item"]
    start, more = tale.rng.randint(2, 9), tale.rng.randint(2, 9)
    given = tale.rng.randint(1, start + more - 2)
    left = start + more - given
    tale.facts.update(items=plural(item), start=counted(start, item), more=number(more))
    tale.facts.update(total=counted(start + more, item), given=counted(given, item))
    tale.facts.update(left=counted(left, item), had=number(given))
    tale.say(
        "{hero} [found|gathered|collected|picked up] {start} and put them in a [bag|box|sack].",
        "near {horizon} {he} [found|spotted|discovered] {more} more, so now {he} had {total}.",
        "but {friend} had [none|no {items} at all] and {freaction}.",
        "{hero} [thought for a moment|did not wait|smiled] and gave {friend} {given}.",
        'now {hero} had {left} and {friend} had {had}. "[thank you|how kind]!" said {friend}.',
        "?{friend} held {fhis} {given} [tightly|with both hands|very carefully].",
        "?at home {hero} counted again: {left}, [just right|not one less|exactly].",
    )


def _repair(tale: Tale) -> None:
    """Something is broken, and the right person mends it with the right tool."""
    tale.pick(REPAIRS, "thing", "damage", "tool", "worker", "mended", "used")
    tale.pick(COLORS, "color")
    tale.say(
        "{hero} had [a|an old|a lovely] {color} {thing}, but {damage}.",
        "{he} was {feeling} and {reaction}.",
        '"[can we save it|what now|what shall we do]?" asked {friend}.',
        "they [went|hurried|ran] to the {worker}, who [nodded|frowned|looked closely].",
        '"[for a {thing}|for this] I need my {tool}," said the {worker}.',
        "{friend} [fetched|brought|handed over] the {tool}, and {hero} [held the lamp|helped].",
        "the {worker} {mended} it [with care|slowly|in no time], and the {color} {thing} was "
        "[whole|as good as new|better than before].",
        "{hero} {used} [at once|with joy|before supper].",
    )


def _animal(tale: Tale) -> None:
    """A hurt animal is fed what it likes and brought home."""
    tale.pick(ANIMALS, "animal", "food", "sound", "home", "part")
    tale.pick(COLORS, "color")
    tale.pick(["Dot", "Patch", "Biscuit", "Pepper", "Button", "Shadow", "Sunny", "Mossy"], "pet")
    tale.say(
        "near {horizon} they heard a [small|weak|sad] sound. Something {sound}.",
        "it was a [little|young|thin] {color} {animal} with a hurt {part}.",
        '"[poor thing|oh no|do not be afraid]," [whispered|said] {hero}.',
        "they [wrapped|washed] its {part} and named it {pet}.",
        "{friend} gave {pet} [some water|a soft bed|a gentle pat], and {hero} gave it {food}, for "
        "every {animal} [loves|likes|eats] {food}.",
        "soon {pet} {sound} [happily|loudly|twice] and moved its {part}.",
        "they took the {animal} [back|home] to its {home}.",
        "?[later|ever after], when {hero} walked past the {home}, {pet} {sound} at {him}.",
    )


def _cook(tale: Tale) -> None:
    """A dish is cooked from its own ingredients and shared out."""
    tale.pick(DISHES, "dish", "needs", "did", "vessel", "server")
    needs = tale.rng.sample(tale.facts["needs"].split(", "), 3)
    guests = tale.rng.randint(2, 9)
    tale.facts.update(zip(("need0", "need1", "need2"), needs, strict=True))
    tale.facts.update(guests=number(guests), served=counted(guests + 2, tale.facts["server"]))
    tale.say(
        "{hero} and {friend} wanted to make {dish} for {guests} [guests|hungry visitors|children].",
        "they needed {need0}, {need1} and {need2}.",
        "they had [plenty of|enough] {need0} and {need1}, but no {need2}!",
        "{hero} {reaction}, because {he} was {feeling}.",
        "{his} {elder} [smiled|winked] and [took|pulled] {need2} out of {ehis} [bag|apron|coat].",
        "{friend} added the {need0}, and {hero} the {need1} and the {need2}.",
        "they {did} it [well|slowly|with a big spoon] and [watched|waited by] the {vessel}.",
        "with the two cooks and the {guests} others, they filled {served}.",
        "?everyone said it was the best {dish} [ever|in town|of the year].",
    )


def _fear(tale: Tale) -> None:
    """Something frightening turns out to be harmless."""
    tale.pick(FEARS, "scare", "where", "truth")
    tale.pick(TOYS, "thing")
    tale.say(
        "that night {hero} noticed {scare} in {where}.",
        '"[is it a ghost|is it a monster|what is that]?" [asked|whispered] {friend}.',
        "{hero} was {feeling}. {He} {reaction} and held {his} {thing} [tightly|close].",
        '{his} {elder} [lit a candle|took a lamp]. "[let us look|come with me]," {ehe} said.',
        "step by step they [crept|walked|went] toward {where}, {hero} with the {thing} in [one"
        " hand|{his} hands].",
        "and there was [nothing but|only|simply] {truth}!",
        "{friend} [giggled|laughed|shook {fhis} head], and {fhe} was not afraid [anymore|now].",
        "?so {scare} had been {truth}.",
    )


def _swap(tale: Tale) -> None:
    """A chain of trades that is told again, in order, at its end."""
    tale.pick_many(TOYS, "a0", "a1", "a2", "a3")
    tale.pick_many(["miller", "sailor", "gardener", "painter", "shepherd", "clown"], "m0", "m1")
    tale.pick_many(COLORS, "c0", "c3")
    tale.say(
        "{hero} had a {c0} {a0}, but {he} [wished for|dreamed of|wanted] a {a3}.",
        "on the road they met a {m0} with a {a1}.",
        '"[will you trade|shall we swap]?" asked {hero}, and gave away the {c0} {a0}.',
        "next they met a {m1}, who [liked|loved|needed] the {a1} and offered a {a2}.",
        "{friend} was [puzzled|curious]. {Fhe} had a {c3} {a3} and [wanted|asked for] the {a2}.",
        "so {hero} gave {fhim} the {a2} and [got|received] the {c3} {a3}.",
        "?the {m0} kept the {a0}, the {m1} kept the {a1}, and {friend} kept the {a2}.",
        "{hero} was [no longer {feeling}|{relief}] and [hugged|admired|polished] the {a3}.",
    )


def _shop(tale: Tale) -> None:
    """Coins are spent, and the change is right."""
    tale.pick_many(TOYS, "thing", "other")
    tale.pick(["baker", "grocer", "peddler", "shopkeeper", "merchant"], "seller")
    price, rest = tale.rng.randint(2, 15), tale.rng.randint(1, 15)
    second = tale.rng.randint(rest + 1, rest + 6)
    tale.facts.update(purse=counted(price + rest, "coin"), price=counted(price, "coin"))
    tale.facts.update(rest=counted(rest, "coin"), second=counted(second, "coin"))
    tale.facts.update(gap=counted(second - rest, "coin"))
    tale.say(
        "{hero} had {purse} in {his} [purse|pocket|jar] and went to the {seller}.",
        '"how much is the {thing}?" {he} asked. "It costs {price}," said the {seller}.',
        "{hero} paid {price} and had {rest} left.",
        "{he} also wanted the {other}, but it cost {second}.",
        "{he} was short of {gap} and felt {feeling}.",
        '"[take mine|I can help]," said {friend}, and put {gap} on the [counter|table].',
        "so {hero} went home with the {thing} and the {other}, and [no coins|an empty purse].",
        "?{he} promised to pay back the {gap} [soon|on {day}|next week].",
    )


def _paint(tale: Tale) -> None:
    """Two paints run together and make a third."""
    tale.pick(MIXES, "c0", "c1", "c2")
    tale.pick_many(PICTURES, "picture", "other")
    tale.say(
        "{hero} [painted|drew] a {picture}, and {friend} [painted|drew] a {other}.",
        "{hero} used {c0} paint and {friend} used {c1} paint.",
        "[suddenly|by accident|oh dear], the {c1} paint [spilled|dripped] over the {c0} {picture}!",
        "{hero} {reaction}. {He} was {feeling}, and {friend} said [sorry|that {fhe} was sorry].",
        "but look, where the {c0} met the {c1}, it turned {c2}!",
        "now there was a {c2} {picture}, [brighter|stranger|finer] than any other {picture}.",
        "?{friend} mixed {c0} and {c1} too, and made the {other} {c2} as well.",
        "{his} {elder} hung the {picture} and the {other} on the wall.",
    )


def _journey(tale: Tale) -> None:
    """A trip with a mishap, a number of miles and a welcome."""
    tale.pick(RIDES, "ride", "moved", "trouble", "cure")
    total, done = tale.rng.randint(12, 40), tale.rng.randint(2, 10)
    tale.pick(TOYS, "gift")
    tale.facts.update(total=number(total), done=counted(done, "mile"), rest=number(total - done))
    tale.say(
        "{hero} and {friend} took a {ride} to visit {his} {elder}, who lived {total} miles away.",
        "they [packed|carried|brought] a {gift} as a present for {ehim}.",
        "the {ride} {moved} [past|toward|beyond] {horizon}.",
        "after {done}, [oh no|suddenly|without warning], {trouble}.",
        '"[only|still] {rest} miles to go," said {friend}, but {hero} was {feeling}.',
        "{hero} {reaction}, and then they {cure} [together|at once|with all their strength].",
        "soon the {ride} {moved} again, and they did the last {rest} miles [singing|in no time].",
        "{his} {elder} [opened the door|waved]. {Ehe} loved the {gift} [dearly|at first sight].",
    )


def _race(tale: Tale) -> None:
    """A race whose order is told and then used."""
    tale.pick_many([row[0] for row in ANIMALS], "r0", "r1", "r2", "r3")
    order = tale.rng.sample(range(4), 4)
    tale.facts.update({f"w{place}": tale.facts[f"r{who}"] for place, who in enumerate(order)})
    tale.pick(["cup", "wreath", "basket of fruit", "blue sash", "honey cake"], "prize")
    tale.pick(_RANKS[:4], "rank")
    tale.facts["ranked"] = tale.facts[f"w{_RANKS.index(tale.facts['rank'])}"]
    tale.say(
        "{place} there was a [great|yearly|funny] race between a {r0}, a {r1}, a {r2} and a {r3}.",
        "the prize was a {prize}, and {hero} [cheered|hoped] for the {ranked}.",
        "first the {w2} was [ahead|in front], but then it [tripped|stopped to rest|slipped].",
        "the {w0} came in first, the {w1} second, the {w2} third and the {w3} last.",
        "so the {prize} went to the {w0}, and {hero} clapped for the {ranked}, who was {rank}.",
        "?the {w3} was {feeling}, but {friend} [patted|comforted|praised] it.",
        "the {w0} shared the {prize} with the {w1}, the {w2} and the {w3}.",
    )


def _grow(tale: Tale) -> None:
    """Seeds grow day by day, and pests take their share."""
    tale.pick(["tulip", "bean", "sunflower", "pumpkin", "radish", "poppy", "rose"], "plant")
    tale.pick(["snail", "crow", "beetle", "slug", "mole", "rabbit"], "pest")
    today = DAYS.index(tale.facts["day"])
    tale.facts.update(day1=DAYS[(today + 1) % 7], day2=DAYS[(today + 2) % 7])
    seeds, eaten = tale.rng.randint(5, 19), tale.rng.randint(1, 4)
    tale.facts.update(
        seeds=counted(seeds, "seed"), left=counted(seeds - eaten, tale.facts["plant"])
    )
    tale.facts.update(eaten=number(eaten), plants=plural(tale.facts["plant"]))
    tale.say(
        "{hero} planted {seeds} of a {plant} in [neat rows|a small bed|a wooden box].",
        "on {day1} nothing [happened|could be seen], and {he} was {feeling}.",
        "on {day2} [tiny|pale] shoots came up, and {friend} [watered|measured|counted] them.",
        "but in the night a [hungry|fat|sly] {pest} ate {eaten} of them! {Hero} {reaction}.",
        "{friend} built a [fence|wall|net] against the {pest}, and {hero} stood guard.",
        "in the end there were {left}, and the {pest} [stayed away|never came back].",
        "?{hero} gave some {plants} to {his} {elder}, who put them in a [jar|basket|blue bowl].",
    )


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


def _ending(tale: Tale, plot: str) -> None:
    """Tells how the day ended and what the plot teaches."""
    tale.facts["moral"] = next(moral for name, moral in MORALS if name == plot)
    tale.say(
        "[in the evening|at last|when the day was over] {change}.",
        "{hero} [was {relief} and {joy}|{joy} and felt {relief}|{joy}, for {he} was {relief}].",
        "?{he} hung {his} {wearcolor} {wear} on a hook [by the door|in the hall].",
        "?{friend} was {relief} too, and {fhe} [waved|went home|fell asleep].",
        "?[soon {hero} would be {nextage}|next year {hero} would be {nextage} years old], but {he} "
        "would [never forget|always remember] that {weather} {day}.",
        "?{hero} [learned|knew now|told {his} {elder}] that {moral}.",
    )


def story(rng: random.Random) -> str:
    """Tells one story.

    Args:
        rng: The source of chance; equal states tell equal stories.

    Returns:
        Three paragraphs, one per line, without a newline at the end.
    """
    tale = Tale(rng)
    plot = rng.choice(list(PLOTS))
    _cast(tale)
    _opening(tale)
    tale.text += "\n"
    PLOTS[plot](tale)
    tale.text += "\n"
    _ending(tale, plot)
    return tale.text
