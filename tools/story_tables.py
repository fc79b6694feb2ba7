"""The words and the sentences of the story grammar.

Sentences use two marks: ``[a|b|c]`` stands for one of the alternatives, which may nest, and
``{fact}`` for something the story knows; ``{Fact}`` is the same with a capital. A sentence that
starts with ``?`` is left out half of the time.

The order of every table counts: moving an entry changes all stories.
"""


def _lines(text: str) -> list[str]:
    """Split a text with one sentence per line."""
    return text.strip().splitlines()


def _rows(table: str) -> list[list[str]]:
    """Split a table with one row per line and ``|`` between its columns."""
    return [[cell.strip() for cell in line.split("|")] for line in _lines(table)]


def _pairs(table: str) -> dict[str, str]:
    """Split a table of two columns into a dictionary."""
    return {key: value for key, value in _rows(table)}


def _phrases(text: str) -> list[str]:
    """Split a list of phrases at its semicolons."""
    return [" ".join(phrase.split()) for phrase in text.split(";")]


def _words(text: str) -> list[str]:
    """Split a list of words at its blanks."""
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

PETS = _words("Dot Patch Biscuit Pepper Button Shadow Sunny Mossy")

TRADERS = _words("miller sailor gardener painter shepherd clown")

SELLERS = _words("baker grocer peddler shopkeeper merchant")

PLANTS = _words("tulip bean sunflower pumpkin radish poppy rose")

PESTS = _words("snail crow beetle slug mole rabbit")

PRIZES = _phrases("cup; wreath; basket of fruit; blue sash; honey cake")

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MORALS = _pairs("""
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

UNITS = _words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
""")

TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")

RANKS = _words("first second third fourth")

OPENING = _lines("""
[once there was a {trait} {kid} named {hero}|{hero} was a {trait} {kid}|\
there lived a {trait} {kid} called {hero}|this is the story of {hero}, a {trait} {kid}], \
who was {age} years old.
[one {weather} {day}|on a {weather} {day}|last {day}, a {weather} day], \
{hero} [was|stood|sat|walked] {place} \
with {his} [friend|neighbor|cousin] {friend}, a {ftrait} {fkid}.
?[{sky}|that morning {sky}|all around them {sky}], so {hero} wore a {wearcolor} {wear}.
?they [saw|watched|passed|counted] a {sight} and [some|many|a few] {sights}.
?the {ground} [felt {sense}|made a funny noise] under {his} feet.
""")

SENTENCES = {
    "lost": _lines("""
{hero} [reached for|looked for|wanted] {his} {color} {thing}, but it was [gone|missing].
?it was a gift from {his} {elder}.
"[have you seen|where is|who took] my {thing}?" asked {hero}.
{he} felt {feeling} and {reaction}.
first they looked {at0}, but they found only [dust|an old sock|a spider|a cork].
then {friend} looked {at1}, but the {thing} was not there [either|at all].
at last {hero} peeked {at2}. "[here it is|I see it|look]!" {he} [cried|shouted|called].
the {color} {thing} had been {at2} [all along|the whole time].
?{friend} was glad that they had not only looked {at0} and {at1}.
"""),
    "count": _lines("""
{hero} [found|gathered|collected|picked up] {start} and put them in a [bag|box|sack].
near {horizon} {he} [found|spotted|discovered] {more} more, so now {he} had {total}.
but {friend} had [none|no {items} at all] and {freaction}.
{hero} [thought for a moment|did not wait|smiled] and gave {friend} {given}.
now {hero} had {left} and {friend} had {had}. "[thank you|how kind]!" said {friend}.
?{friend} held {fhis} {given} [tightly|with both hands|very carefully].
?at home {hero} counted again: {left}, [just right|not one less|exactly].
"""),
    "repair": _lines("""
{hero} had [a|an old|a lovely] {color} {thing}, but {damage}.
{he} was {feeling} and {reaction}.
"[can we save it|what now|what shall we do]?" asked {friend}.
they [went|hurried|ran] to the {worker}, who [nodded|frowned|looked closely].
"[for a {thing}|for this] I need my {tool}," said the {worker}.
{friend} [fetched|brought|handed over] the {tool}, and {hero} [held the lamp|helped].
the {worker} {mended} it [with care|slowly|in no time], and the {color} {thing} was \
[whole|as good as new|better than before].
{hero} {used} [at once|with joy|before supper].
"""),
    "animal": _lines("""
near {horizon} they heard a [small|weak|sad] sound. Something {sound}.
it was a [little|young|thin] {color} {animal} with a hurt {part}.
"[poor thing|oh no|do not be afraid]," [whispered|said] {hero}.
they [wrapped|washed] its {part} and named it {pet}.
{friend} gave {pet} [some water|a soft bed|a gentle pat], \
and {hero} gave it {food}, for every {animal} [loves|likes|eats] {food}.
soon {pet} {sound} [happily|loudly|twice] and moved its {part}.
they took the {animal} [back|home] to its {home}.
?[later|ever after], when {hero} walked past the {home}, {pet} {sound} at {him}.
"""),
    "cook": _lines("""
{hero} and {friend} wanted to make {dish} for {guests} [guests|hungry visitors|children].
they needed {need0}, {need1} and {need2}.
they had [plenty of|enough] {need0} and {need1}, but no {need2}!
{hero} {reaction}, because {he} was {feeling}.
{his} {elder} [smiled|winked] and [took|pulled] {need2} out of {ehis} [bag|apron|coat].
{friend} added the {need0}, and {hero} the {need1} and the {need2}.
they {did} it [well|slowly|with a big spoon] and [watched|waited by] the {vessel}.
with the two cooks and the {guests} others, they filled {served}.
?everyone said it was the best {dish} [ever|in town|of the year].
"""),
    "fear": _lines("""
that night {hero} noticed {scare} in {where}.
"[is it a ghost|is it a monster|what is that]?" [asked|whispered] {friend}.
{hero} was {feeling}. {He} {reaction} and held {his} {thing} [tightly|close].
{his} {elder} [lit a candle|took a lamp]. "[let us look|come with me]," {ehe} said.
step by step they [crept|walked|went] toward {where}, {hero} with the {thing} \
in [one hand|{his} hands].
and there was [nothing but|only|simply] {truth}!
{friend} [giggled|laughed|shook {fhis} head], and {fhe} was not afraid [anymore|now].
?so {scare} had been {truth}.
"""),
    "swap": _lines("""
{hero} had a {c0} {a0}, but {he} [wished for|dreamed of|wanted] a {a3}.
on the road they met a {m0} with a {a1}.
"[will you trade|shall we swap]?" asked {hero}, and gave away the {c0} {a0}.
next they met a {m1}, who [liked|loved|needed] the {a1} and offered a {a2}.
{friend} was [puzzled|curious]. {Fhe} had a {c3} {a3} and [wanted|asked for] the {a2}.
so {hero} gave {fhim} the {a2} and [got|received] the {c3} {a3}.
?the {m0} kept the {a0}, the {m1} kept the {a1}, and {friend} kept the {a2}.
{hero} was [no longer {feeling}|{relief}] and [hugged|admired|polished] the {a3}.
"""),
    "shop": _lines("""
{hero} had {purse} in {his} [purse|pocket|jar] and went to the {seller}.
"how much is the {thing}?" {he} asked. "It costs {price}," said the {seller}.
{hero} paid {price} and had {rest} left.
{he} also wanted the {other}, but it cost {second}.
{he} was short of {gap} and felt {feeling}.
"[take mine|I can help]," said {friend}, and put {gap} on the [counter|table].
so {hero} went home with the {thing} and the {other}, and [no coins|an empty purse].
?{he} promised to pay back the {gap} [soon|on {day}|next week].
"""),
    "paint": _lines("""
{hero} [painted|drew] a {picture}, and {friend} [painted|drew] a {other}.
{hero} used {c0} paint and {friend} used {c1} paint.
[suddenly|by accident|oh dear], the {c1} paint [spilled|dripped] over the {c0} {picture}!
{hero} {reaction}. {He} was {feeling}, and {friend} said [sorry|that {fhe} was sorry].
but look, where the {c0} met the {c1}, it turned {c2}!
now there was a {c2} {picture}, [brighter|stranger|finer] than any other {picture}.
?{friend} mixed {c0} and {c1} too, and made the {other} {c2} as well.
{his} {elder} hung the {picture} and the {other} on the wall.
"""),
    "journey": _lines("""
{hero} and {friend} took a {ride} to visit {his} {elder}, who lived {total} miles away.
they [packed|carried|brought] a {gift} as a present for {ehim}.
the {ride} {moved} [past|toward|beyond] {horizon}.
after {done}, [oh no|suddenly|without warning], {trouble}.
"[only|still] {rest} miles to go," said {friend}, but {hero} was {feeling}.
{hero} {reaction}, and then they {cure} [together|at once|with all their strength].
soon the {ride} {moved} again, and they did the last {rest} miles [singing|in no time].
{his} {elder} [opened the door|waved]. {Ehe} loved the {gift} [dearly|at first sight].
"""),
    "race": _lines("""
{place} there was a [great|yearly|funny] race between a {r0}, a {r1}, a {r2} and a {r3}.
the prize was a {prize}, and {hero} [cheered|hoped] for the {ranked}.
first the {w2} was [ahead|in front], but then it [tripped|stopped to rest|slipped].
the {w0} came in first, the {w1} second, the {w2} third and the {w3} last.
so the {prize} went to the {w0}, and {hero} clapped for the {ranked}, who was {rank}.
?the {w3} was {feeling}, but {friend} [patted|comforted|praised] it.
the {w0} shared the {prize} with the {w1}, the {w2} and the {w3}.
"""),
    "grow": _lines("""
{hero} planted {seeds} of a {plant} in [neat rows|a small bed|a wooden box].
on {day1} nothing [happened|could be seen], and {he} was {feeling}.
on {day2} [tiny|pale] shoots came up, and {friend} [watered|measured|counted] them.
but in the night a [hungry|fat|sly] {pest} ate {eaten} of them! {Hero} {reaction}.
{friend} built a [fence|wall|net] against the {pest}, and {hero} stood guard.
in the end there were {left}, and the {pest} [stayed away|never came back].
?{hero} gave some {plants} to {his} {elder}, who put them in a [jar|basket|blue bowl].
"""),
}

ENDING = _lines("""
[in the evening|at last|when the day was over] {change}.
{hero} [was {relief} and {joy}|{joy} and felt {relief}|{joy}, for {he} was {relief}].
?{he} hung {his} {wearcolor} {wear} on a hook [by the door|in the hall].
?{friend} was {relief} too, and {fhe} [waved|went home|fell asleep].
?[soon {hero} would be {nextage}|next year {hero} would be {nextage} years old], \
but {he} would [never forget|always remember] that {weather} {day}.
?{hero} [learned|knew now|told {his} {elder}] that {moral}.
""")
