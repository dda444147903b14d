"""The English word lists behind the gate (`gate.py`). Data only.

Closed classes are listed in full (negations, number words, question words, units); antonyms are the common pairs of
comparison, order, switching, trade and direction, with their inflections. Synonyms are few: one that is missing costs
an answer, one that is wrong serves a false one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def _words(text: str) -> list[str]:
    return text.split()


NEGATIONS = frozenset(
    _words("not no never none nobody nothing nowhere neither nor without cannot hardly barely unable except excluding")
)

_SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")

NUMBER_WORDS: Mapping[str, int] = {
    **{word: value for value, word in enumerate(_SMALL) if word != "one"},
    **{word: 10 * (i + 2) for i, word in enumerate(_TENS)},
}
""" "one" is left out: it is a pronoun more often than a number ("which one")."""

SCALES: Mapping[str, int] = {
    "hundred": 100,
    "thousand": 1_000,
    "million": 1_000_000,
    "billion": 1_000_000_000,
    "trillion": 1_000_000_000_000,
}

# One axis a line (indented lines continue one): the words of one pole | the words of the other.
_AXES = """
more greater larger bigger higher | less fewer smaller lower
most largest biggest highest | least fewest smallest lowest
max maximum maximal maximize maximise maximizing | min minimum minimal minimize minimise minimizing
older oldest elder | younger youngest newer newest
longer longest | shorter shortest
taller tallest | shorter shortest
faster fastest quicker quickest | slower slowest
heavier heaviest | lighter lightest
hotter hottest warmer warmest | colder coldest cooler coolest
better best | worse worst
cheaper cheapest | pricier priciest dearer
richer richest | poorer poorest
earlier earliest sooner | later latest
increase increases increased increasing raise raises raised raising grow grows grew growing rise rises rose
    rising gain gains gained gaining | decrease decreases decreased decreasing reduce reduces reduced reducing
    shrink shrinks shrank shrinking fall falls fell falling drop drops dropped dropping lose loses lost losing
    lower lowers lowered lowering
enable enables enabled enabling activate activates activated activating | disable disables disabled disabling
    deactivate deactivates deactivated deactivating
on | off
allow allows allowed allowing permit permits permitted permitting | forbid forbids forbidden forbidding deny
    denies denied denying block blocks blocked blocking prohibit prohibits prohibited prevent prevents prevented
    preventing
add adds added adding insert inserts inserted inserting append install installs installed installing | remove
    removes removed removing delete deletes deleted deleting uninstall uninstalls uninstalled uninstalling
buy buys buying bought purchase purchases purchased purchasing | sell sells selling sold
before | after
first | last second third
next following | previous prior
left | right
up upward upwards | down downward downwards
above over | below under beneath
inside within | outside
front | back rear
top upper | bottom lower
start starts started starting begin begins began beginning open opens opened opening | stop stops stopped
    stopping end ends ended ending finish finishes finished finishing close closes closed closing
lock locks locked locking | unlock unlocks unlocked unlocking
encrypt encrypts encrypted encrypting encode encoding | decrypt decrypts decrypted decrypting decode decoding
compress compressing zip | decompress decompressing unzip extract
upload uploads uploaded uploading | download downloads downloaded downloading
import imports imported importing | export exports exported exporting
read reads reading | write writes writing wrote
push pushes pushed pushing | pull pulls pulled pulling
send sends sent sending | receive receives received receiving
give gives gave given giving | take takes took taken taking
lend lends lent lending | borrow borrows borrowed borrowing
win wins won winning | lose loses lost losing
pass passes passed passing succeed succeeds succeeded | fail fails failed failing
accept accepts accepted accepting approve approves approved | reject rejects rejected rejecting refuse refuses
    refused decline declines declined
love loves loved like likes liked | hate hates hated dislike dislikes disliked
show shows showing shown display | hide hides hiding hidden
include includes included including with | exclude excludes excluded excluding without
connect connects connected connecting | disconnect disconnects disconnected disconnecting
attach attaches attached | detach detaches detached
mount mounts mounted | unmount unmounts unmounted
subscribe subscribes subscribed | unsubscribe unsubscribes unsubscribed
follow follows | unfollow unfollows
login signin | logout signout
mute muted | unmute unmuted
do | undo
advantage advantages benefit benefits pro pros strength strengths | disadvantage disadvantages drawback
    drawbacks con cons weakness weaknesses downside downsides
positive | negative
true | false
legal | illegal
safe | unsafe dangerous
possible | impossible
public | private
internal | external
input inputs | output outputs
source | destination target
sync synchronous | async asynchronous
ascending asc | descending desc
horizontal horizontally | vertical vertically
row rows | column columns
north northern | south southern
east eastern | west western
male males man men boy boys husband father son brother king he him his | female females woman women girl girls
    wife mother daughter sister queen she her hers
day | night
morning | evening afternoon
summer | winter
hot | cold
rich | poor
old | young new
long | short
good | bad
fast quick | slow
early | late
cheap | expensive
easy | hard difficult
full | empty
always | never sometimes
all every each always everyone everybody everything | some any no none few nobody nothing
some | no none
often frequently | rarely seldom
many much lots | few little
double doubled twice | half halved
twice | thrice triple tripled
multiply multiplied | divide divided
plus sum | minus difference
even | odd
gain gains | loss losses
profit profits | loss losses
income | expense expenses
credit | debit
asset assets | liability liabilities
arrive arrives arrived arriving arrival | leave leaves left leaving depart departs departed departure
enter enters entered | exit exits exited leave leaves
join joins joined | leave leaves quit
parent parents | child children
employer | employee
client | server
teacher teachers | student students
cause causes | effect effects symptom symptoms cure cures
minor | major
single | married
upgrade upgrades upgraded upgrading | downgrade downgrades downgraded downgrading
deploy | undeploy
commit | revert rollback
merge | split
expand | collapse
deposit deposits deposited | withdraw withdraws withdrew withdrawal
save saves saved saving | spend spends spent spending
today | tomorrow yesterday
past | future
"""


def _read_axes(lines: str) -> dict[str, tuple[tuple[int, int], ...]]:
    axes: dict[str, tuple[tuple[int, int], ...]] = {}
    for axis, line in enumerate(lines.strip().replace("\n    ", " ").splitlines()):
        for pole, words in enumerate(line.split("|")):
            for word in words.split():
                axes[word] = (*axes.get(word, ()), (axis, pole))
    return axes


ANTONYMS: Mapping[str, tuple[tuple[int, int], ...]] = _read_axes(_AXES)
"""word -> its (axis, pole)s."""

_UNIT_NAMES = """
millisecond milliseconds ms
second seconds sec secs
minute minutes min mins
hour hours hr hrs hourly
day days daily
week weeks weekly
fortnight fortnights
month months monthly
quarter quarters quarterly
year years yearly annual annually
decade decades
century centuries
monday mondays
tuesday tuesdays
wednesday wednesdays
thursday thursdays
friday fridays
saturday saturdays
sunday sundays
january
february
march
april
june
july
august
september
october
november
december
millimeter millimeters millimetre millimetres mm
centimeter centimeters centimetre centimetres cm
meter meters metre metres
kilometer kilometers kilometre kilometres km
inch inches
foot feet ft
yard yards
mile miles
gram grams
kilogram kilograms kg kilo kilos
pound pounds lb lbs
ounce ounces oz
ton tons tonne tonnes
liter liters litre litres
milliliter milliliters millilitre millilitres ml
gallon gallons
celsius
fahrenheit
kelvin
dollar dollars usd
cent cents
euro euros eur
rupee rupees inr
yen jpy
percent percentage
byte bytes
kilobyte kilobytes kb
megabyte megabytes mb
gigabyte gigabytes gb
terabyte terabytes tb
bit bits
"""

TIME_AND_MEASURE: Mapping[str, str] = {
    word: line.split()[0] for line in _UNIT_NAMES.strip().splitlines() for word in line.split()
}
"""word -> the unit it names."""

WH_WORDS: Mapping[str, str] = {
    "who": "who",
    "whom": "who",
    "whose": "whose",
    "when": "when",
    "where": "where",
    "why": "why",
    "how": "how",
}

PRONOUNS: Mapping[str, str] = {
    **dict.fromkeys(_words("i me my mine we us our ours"), "speaker"),
    **dict.fromkeys(_words("you your yours"), "listener"),
    **dict.fromkeys(_words("he him his"), "he"),
    **dict.fromkeys(_words("she her hers"), "she"),
    **dict.fromkeys(_words("they them their theirs"), "they"),
}
"""word -> whom it stands for."""

FORMATS = frozenset(
    _words(
        "json yaml xml csv html markdown latex table bullet bullets list essay poem haiku summary paragraph "
        "english french german spanish italian portuguese dutch polish russian ukrainian chinese japanese korean "
        "hindi arabic turkish python javascript typescript java rust golang ruby php kotlin swift scala perl "
        "haskell sql bash powershell"
    )
)

PREPOSITIONS = frozenset(_words("of in on at by for from to with about as into onto than"))

DIRECTIONS = frozenset(_words("from to into onto than over under before after against"))

FUNCTION_WORDS = frozenset(
    _words(
        "a an the i you he she it we they me him her us them my your his its our their this that these those "
        "is am are was were be been being do does did done have has had having can could will would shall "
        "should may might must to of in on at by for from with about as into onto than and or but if so what "
        "which who whom whose when where why how there here just also very really too please some any many "
        "much more most"
    )
)

FILLERS = frozenset(
    _words(
        "one ones someone somebody anyone anybody something anything thing things myself yourself himself herself "
        "itself ourselves themselves oneself way ways ever actually exactly basically simply possibly then now such "
        "yes kindly hi hello hey thanks thank think opinion opinions happen happens happening want wants like all each "
        "every both either during using within through via while because since though although whether upon among "
        "along between"
    )
)
"""Beside the function words: they come and go between two wordings of one question."""

LIGHT_WORDS = frozenset(
    _words(
        "get become make take give go come use have start feel find consider call keep consist contain include "
        "good best possible available people"
    )
)
"""They change a question where they replace one another ("get", "keep a job") but not where they are only added."""

DEICTICS: Mapping[str, str] = {
    **dict.fromkeys(_words("current currently present ongoing"), "current"),
    **dict.fromkeys(_words("last past previous previously prior preceding"), "previous"),
    **dict.fromkeys(_words("next following upcoming coming"), "next"),
}
"""word -> which of several times or things it points to, seen from now; so does "this" before `TIMES`."""

TIMES = frozenset(
    _words(
        "time second minute hour morning afternoon evening day night weekend week fortnight month quarter semester "
        "term season spring summer autumn winter year decade century"
    )
)

OPPOSING_PREFIXES = tuple(
    _words(
        "counter under inter intra hyper multi super trans anti hypo macro mega micro mini mono over poly post semi "
        "auto bio dis mal mis neo non out pre pro sub uni bi co de ex im in ir il re tri un up"
    )
)
"""Two words that differ in nothing but one of them mean different things."""

_IRREGULAR = """
be am is are was were been being
become became
begin began begun
break broke broken
bring brought
build built
buy bought
catch caught
child children
choose chose chosen
come came
die died dying
do does did done doing
draw drew drawn
drink drank drunk
drive drove driven
eat ate eaten
fall fell fallen
feel felt
fight fought
find found
fly flew flown
foot feet
forget forgot forgotten
get got gotten
give gave given
go goes went gone
grow grew grown
hear heard
hold held
keep kept
know knew known
leave left
lend lent
lose lost
make made
man men
mean meant
meet met
mouse mice
pay paid
person people persons
run ran
say said
see saw seen
sell sold
send sent
sing sang sung
sit sat
sleep slept
speak spoke spoken
spend spent
stand stood
steal stole stolen
swim swam swum
take took taken
teach taught
tell told
think thought
tooth teeth
understand understood
use used using
wear wore worn
win won
woman women
write wrote written
"""

_SYNONYMS = """
movie film
picture photo photograph pic image
big large huge
biggest largest
small little tiny
kid child
begin start
end finish
buy purchase
fix repair resolve solve
job occupation
rich wealthy
reason cause
kind type sort
car automobile
author writer
good best great better
delete remove
create make build produce generate
shop store
quick fast rapid
fastest quickest
hard difficult
easy simple
easiest simplest
use utilize
allow permit let
require need
help assist
get obtain acquire
choose select pick
earth world
major main
center middle
doctor physician
lawyer attorney
happy glad
sick ill
weird strange
website site
differ different difference
below under
answer reply
exam examination
tv television
fridge refrigerator
phone telephone
ad advert advertisement
math maths mathematics
app application
info information
intro introduction
tech technology
execute run
convert transform
find locate
improve enhance
modify change alter
nation country
street road
dad father
mom mum mother
grandma grandmother
grandpa grandfather
bicycle bike
airplane aircraft
vacation holiday
trash garbage rubbish
truck lorry
gray grey
program programme
license licence
defense defence
catalog catalogue
dialog dialogue
travel travell
cancel cancell
model modell
label labell
pajamas pyjamas
tire tyre
aluminum aluminium
jewelry jewellery
plow plough
skeptical sceptical
artifact artefact
"""

# The first word of each line stands for the others.
IRREGULAR_FORMS: Mapping[str, str] = {
    form: line.split()[0] for line in _IRREGULAR.strip().splitlines() for form in line.split()
}

SYNONYMS: Sequence[Sequence[str]] = [line.split() for line in _SYNONYMS.strip().splitlines()]
"""Each a group whose words may stand for one another."""
