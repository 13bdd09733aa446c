"""English words that change what a question asks, and the words that say which texts are English.

Rules of the tables. A word of `EXACT` must be in both texts, at the same place among their facts: leaving it out changes what is asked.
An axis has two or more poles, which exclude each other: texts that both have an axis must have the same poles of it. The order of
`FUNCTION` words, which have no content, says nothing. The lists hold the closed classes of words of English grammars, the opposites of
which reports about semantic caches complain (GPTCache#694, semantic-router#2691), and others of the same kinds: states, directions,
quantities, times, roles. A word too many costs a hit; a word too few can cost a wrong answer.
"""

from __future__ import annotations

from typing import Final


def stem(word: str) -> str:
    """Return *word*, in lower case, without an English ending: a common key of its forms, no word."""
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            word = word[: len(word) - len(ending)] + instead
            break
    if len(word) > _SHORTEST_STEM and word[-1] == word[-2] and word[-1] in "bdglmnprt":
        word = word[:-1]
    return word[:-1] if word.endswith("e") and len(word) > _SHORTEST_STEM else word


def degree(word: str) -> str:
    """Return "er" or "est" if *word*, in lower case, compares something that has an opposite; else an empty text."""
    if word in OPPOSED:
        return ""
    for ending in ("est", "er"):
        base = word.removesuffix(ending)
        doubled = len(base) > 1 and base[-1] == base[-2]
        if base != word and OPPOSED & {base, base + "e", base[:-1] if doubled else base, base.removesuffix("i") + "y"}:
            return ending
    return ""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SHORTEST_STEM: Final = 3
_ENDINGS: Final = (
    *(("ations", ""), ("ation", ""), ("ivities", "iv"), ("ivity", "iv"), ("iest", "y"), ("ies", "y"), ("ied", "y")),
    *(("ier", "y"), ("ying", "y"), ("ments", ""), ("ment", ""), ("ing", ""), ("ings", ""), ("ers", ""), ("ors", "")),
    *(("est", ""), ("er", ""), ("or", ""), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("ed", "")),
    *(("ily", "y"), ("ly", ""), ("ss", "ss"), ("us", "us"), ("is", "is"), ("s", "")),
)
"""Endings, the first that fits counts, and what takes their place."""

_NEGATIONS: Final = """
not no none nobody nothing nowhere nor neither never without hardly barely scarcely rarely seldom except excepting
excluding besides unless impossible lack lacks lacking lacked minus instead rather otherwise unable non anymore longer
avoid avoids avoided avoiding prevent prevents prevented preventing refuse refuses refused refusing free fail fails
failed failing stop stops stopped stopping forbid forbids forbidden deny denies denied skip skips skipped skipping
ignore ignores ignored ignoring
"""
_PREFIXES: Final = "un anti pro pre post semi bi ex sub multi mini self"
"""Beginnings that stand apart, or before a hyphen."""

_NAMES: Final = """
english french german spanish italian portuguese dutch swedish danish norwegian finnish polish czech russian ukrainian
greek turkish arabic hebrew hindi bengali urdu chinese mandarin cantonese japanese korean vietnamese thai indonesian
malay latin american british european african asian mexican canadian australian indian brazilian swiss austrian belgian
irish scottish python java javascript typescript rust golang ruby php perl swift kotlin scala bash sql html css json xml
yaml csv pdf excel word linux windows mac macos android ios iphone ipad google apple amazon microsoft facebook paypal
visa mastercard
"""
"""Names that are often written without a capital: languages, peoples, formats, products."""

_CONTRACTED: Final = "dont doesnt didnt isnt wasnt hasnt havent arent werent aint hadnt"
_MODALS: Final = {
    "can": "cant cannot couldnt",
    "will": "wont wouldnt",
    "must": "shouldnt neednt mustnt shant mightnt darent",
}
"""Negated verbs that say more than "not", without their apostrophe, under one of their kind."""

_QUANTIFIERS: Final = """
all any some every everything everyone everybody everywhere anything anyone anybody anywhere something someone
somebody somewhere each either both only solely exclusively merely few fewer several many majority minority most least
more less much enough too whole entire entirely partly partially completely totally mostly almost nearly exactly
approximately roughly precisely maximum minimum max min always sometimes usually often occasionally ever than multiple
another other others same different else except
"""
_NUMBERS: Final = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million millions
billion billions trillion trillions first second seconds secondly firstly third thirds fourth fifth sixth seventh eighth
ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth
thirtieth hundredth thousandth halves quarters ii iii iv vi vii viii ix xi xii xiii xiv xv once twice thrice twofold
threefold fourfold fivefold tenfold hundredfold half quarter double triple quadruple dozen dozens pair pairs single
couple
"""
_DATES: Final = """
monday tuesday wednesday thursday friday saturday sunday mondays tuesdays wednesdays thursdays fridays saturdays
sundays mon tue tues wed thu thur thurs fri january february march april june july august september october november
december jan feb mar apr jun jul aug sep sept oct nov dec today tomorrow yesterday tonight morning mornings afternoon
evening evenings night nights noon midday midnight pm day days week weeks weekend weekends weekday weekdays fortnight
month months year years decade decades century hour hours minute minutes moment moments daily weekly monthly yearly
annual annually hourly quarterly nightly biweekly spring summer autumn winter christmas easter ago
"""
_UNITS: Final = """
dollar dollars euro euros pound pounds cent cents penny pence yen yuan rupee rupees franc francs krona kronor krone
kroner peso pesos real reais rand won zloty dirham dirhams riyal shekel shekels lira bitcoin bitcoins usd eur gbp jpy
cny rmb inr chf sek nok dkk cad aud nzd sgd hkd mxn brl zar krw pln aed ils try btc eth bucks percent percentage pct
km kms kilometer kilometers kilometre kilometres mile miles meter meters metre metres centimeter centimeters
centimetre centimetres millimeter millimeters cm mm foot feet inch inches yard yards kg kgs kilogram kilograms kilo
kilos gram grams mg ounce ounces oz lb lbs tonne tonnes ton tons liter liters litre litres ml gallon gallons pint
pints cup cups degree degrees celsius fahrenheit kelvin byte bytes kb mb gb tb kib mib gib bit bits mbps gbps hertz hz
khz mhz ghz watt watts kw kwh volt volts amp amps mph kph calorie calories kcal joule joules pixel pixels px ms sec
secs min mins hr hrs yr yrs
"""
_ORDER: Final = """
before after until till since during while first last next previous prior following then later earlier sooner now
afterwards beforehand between within past beyond above below over under behind ahead against toward towards through
versus vs off from final initial former latter by
"""
_QUESTIONS: Final = "who whom whose when where why which"
_CONDITIONS: Final = "if or whether"

EXACT: Final[dict[str, tuple[str, str]]] = {
    word: (kind, value or word)
    for kind, words, value in (
        ("conditions", _CONDITIONS, ""),
        ("questions", _QUESTIONS, ""),
        ("order", _ORDER, ""),
        ("quantities", _QUANTIFIERS, ""),
        ("units", _UNITS, ""),
        ("dates", _DATES, ""),
        ("numbers", _NUMBERS, ""),
        ("names", _NAMES, ""),
        ("negation", _NEGATIONS, ""),
        ("negation", _PREFIXES, ""),
        ("negation", _CONTRACTED, "not"),
        *(("negation", words, f"{modal} not") for modal, words in _MODALS.items()),
    )
    for word in words.split()
}
"""The kind and the value of the fact that a word, in lower case, states."""

MODALS: Final = {
    word: f"{modal} "
    for modal, words in {
        "can": "can could",
        "will": "will would",
        "must": "should must need shall might may dare ought",
    }.items()
    for word in words.split()
}
"""Meanings of a negation after one of these verbs, apart from "not"."""

HOW: Final = _set("long much many often far old soon big fast large high tall deep wide late early come")
"""Words after "how" that make another question of it."""

# One axis a line, its poles apart by a bar; an indented line goes on.
_AXES: Final = """
on enable activate reactivate start begin begun began started resume launch boot connect arm open reopen | off
    disable deactivate stop end finish pause suspend quit shutdown disconnect disarm close shut terminate cancel
    halt abort
with | without
in into inside indoor enter entry inward incoming inbound import input ingress signin login | out outside
    outdoor exit leave left outward outgoing outbound export output egress logout signout
up upward upstairs raise rise rose risen increase upgrade upload grow gain climb boost higher more | down downward
    downstairs lower fall fell fallen decrease downgrade download shrink drop decline reduce loss lose lost less
    fewer
allow permit accept approve enable grant welcome agree consent authorise authorize pass succeed success successful
    complete | deny denied forbid forbidden prohibit reject refuse decline block ban disapprove disagree revoke fail
    failed failure unsuccessful
add insert append attach include create make install join subscribe follow register enrol enroll mount | remove
    delete erase omit detach exclude destroy uninstall drop leave unsubscribe unfollow unregister unmount subtract
    deduct clear wipe
lock block freeze froze frozen secure | unlock unblock unfreeze unfrozen
buy bought purchase | sell sold sale
send sent sender pay paid payer give gave given payout transfer outgoing ship shipped | receive receiver recipient
    get got gotten payee take took taken incoming collect
deposit topup | withdraw withdrew withdrawn withdrawal
lend lent lender loan | borrow borrower
charge bill | refund reimburse
credit | debit | prepaid
show reveal display visible unhide | hide hid hidden invisible conceal
expand open | collapse close
encrypt encode compress zip pack serialize | decrypt decode decompress unzip unpack extract deserialize
push write wrote written save | pull read load
multiply | divide
plus positive add | minus negative subtract
increase maximum maximise maximize highest | decrease minimum minimise minimize lowest
more most greater bigger larger higher longer | less least fewer smaller lower shorter
high tall | low short
big large huge great | small little tiny minor
long | short brief
old ancient used | new young modern recent
fast quick rapid instant | slow delay
early | late
near close nearby | far distant remote
good great better best | bad worse worst poor
cheap inexpensive affordable | expensive costly pricey
easy simple | hard difficult complex complicated
strong strength | weak weakness
pro pros benefit | con cons drawback
uppercase capital | lowercase
sunny dry | rainy wet | cloudy | snowy | windy
lead | trail follow
red | orange | yellow | green | blue | purple violet | pink | brown | black | white | grey gray | silver | gold
    golden
heavy | light
hot warm | cold cool
wet | dry
full | empty partial
thick | thin
wide broad | narrow
deep | shallow
rich | poor
hard | soft
dark night | light day bright
loud | quiet silent
clean | dirty
safe secure | dangerous risky hazardous
free | paid charged
right correct true valid | wrong incorrect false invalid
right | left
yes | no
top upper | bottom lower
front | back rear
above over | below under beneath
before previous prior ago earlier past yesterday last | after next following later future tomorrow
first initial | last final
internal domestic national local home inland | external foreign international abroad overseas global
public | private
physical | virtual digital electronic disposable
online | offline
manual | automatic auto
permanent | temporary
fixed | variable floating
gross | net
single | married | divorced | widowed
wholesale | retail
minor child kid | adult
male man men boy he him his husband father son brother gentleman king | female woman women girl she her hers wife
    mother daughter sister lady queen
parent father mother | child son daughter
buyer customer client | seller vendor merchant
employer | employee
landlord | tenant
teacher | student
doctor | patient
client | server
source origin sender | destination target recipient
landlord owner | renter
alive live living birth born | dead death die died
win won winner | lose lost loser
profit income earn revenue | loss expense spend spent cost
love like | hate dislike
arrive arrival | depart departure leave left
north | south | east | west
horizontal row | vertical column
ascending | descending
synchronous | asynchronous
cause | prevent
possible | impossible
legal | illegal
always | never sometimes
can could may might optional | must mandatory required obligatory compulsory
and | or
my mine our ours me us i we | his her hers their theirs he she they them him
active | inactive dormant
present | absent
guilty | innocent
import | export
acid | base
vegetarian vegan | meat
morning | evening
summer | winter
same equal identical | different unequal
will shall gonna | was were did
personal individual | business corporate company joint shared
lost found | stolen
lost stolen missing | found
pending | completed
keep retain | replace change
"""


OPPOSED: Final = _set(_AXES) - {"|"}
"""The words of the axes as they are written there."""


def _poles() -> dict[str, tuple[tuple[int, int], ...]]:
    poles: dict[str, set[tuple[int, int]]] = {}
    for axis, line in enumerate(_AXES.strip().replace("\n    ", " ").splitlines()):
        for pole, words in enumerate(line.split("|")):
            for word in words.split():
                poles.setdefault(stem(word), set()).add((axis, pole))
    return {word: tuple(sorted(found)) for word, found in poles.items()}


POLES: Final = _poles()
"""The poles (axis, pole) of a stem."""

NEGATIVE_PREFIXES: Final = (
    *("un", "in", "im", "il", "ir", "dis", "non", "mis", "de", "anti", "counter", "mal"),
    *("under", "over", "re", "pre", "post"),
)
"""Beginnings that turn the rest of a word around, or move it: "usual" and "unusual", "paid" and "prepaid"."""

DIRECTIONS: Final = _set("from to into onto than versus vs over instead between by for against toward towards")
"""Words after which the order of what they connect matters."""

ENGLISH: Final = _set("""
the this that these those there here what when where why which who whose how my your his its our their you it he she
they we them him us myself yourself is was were been being have has had having do does did doing can could will would
shall should might must with without from about into through because than then and but if whether while until after
before again also already always just only very please thanks thank hi hello hey need want help tell give know get got
make made use using used show explain describe find keep see look like think could went going not isn't don't doesn't
didn't can't won't i i'm i've i'd unable cannot trying tried try work works working still yet which any some many much
more most other another such same each every both few cost
""")
"""Words by which English is recognised."""

FOREIGN: Final = _set("""
nicht nichts kein keine keinen keinem keiner keines nie niemals niemand weder ohne nur außer ist und der das ein eine
einen wie kann ich mir mein meine warum wann wo ne pas jamais rien aucun aucune sans sauf seulement est les une des je
mon ma mes comment pourquoi quand où que qui nunca nada nadie ninguno ninguna ningún jamás tampoco sin salvo excepto
el los las una mi cómo qué cuándo dónde por para mai niente nessun nessuno nessuna senza tranne né il lo gli della che
perché quando posso não nem nenhum nenhuma sem apenas meu minha como quando onde niet geen nooit niets zonder alleen
behalve het een ik mijn hoe waarom inte ingen inget inga aldrig utan utom jag hur varför ikke ingen intet aldrig aldri
uden uten jeg hvordan hvorfor nie nigdy bez tylko nikt żaden jak dlaczego mogę není nikdy jen proč nem nincs soha
nélkül csak nu de la le du er dem zu mit auf für bei von sind haben werden wird avec dans sur vous
nous esto esta está soy di sono um os ao na em og att och på är som jest się niciodată fără doar değil yok
tidak bukan tanpa không ei en eivät ilman vain miksi
""")
"""Words by which a text shows that it is not in English, or not only; negations above all."""

AMBIGUOUS: Final = _set("""
was will die me no on a an in so do as to i my of are for at is am her has once he we be but had it hi get made art
not most us sit see man mine per se use must hey well her fort kind want bin dies then den der du ja al also van ben
men was dat wat het even over las son como
""")
"""Words that other languages in the same letters have as well."""

FUNCTION: Final = _set("""
a an the this that these those there here what when where why which who whom whose how i me my mine we us our ours you
your yours he him his she her hers it its they them their theirs myself yourself itself themselves is am are was were
be been being have has had having do does did doing done can could will would shall should may might must ought of in
on at to from by for with about into onto over under up down out off and or but if as so than then too very just also
please thanks thank hi hello hey ok okay well now still yet already s d m re ve ll way let lets kindly
""")
"""Words without content: their order is not compared."""

STARTERS: Final = (
    FUNCTION
    | ENGLISH
    | _set("""
all any some no not never none yes can't yours every everything anything something nothing someone nobody once since
until after before during between both either neither each only even though although unless without within because
while whenever wherever whether however instead why's what's how's who's where's there's that's it's hasn't haven't
isn't aren't wasn't weren't couldn't wouldn't shouldn't doesn't give tell explain describe list write find show name
translate summarize summarise compare calculate compute convert define classify suggest recommend create make generate
check change cancel close open reset update set send move turn add remove delete get got getting am looking wondering
trying can't cannot dear sorry excuse good are is regarding re note question problem issue help need want assist today
yesterday tomorrow last next first second finally also recently currently lately unfortunately apparently actually
basically maybe perhaps using according given new old does did one two three more most less many much several few
another other hello there's im ive id
""")
)
"""Words with which sentences begin: capitalised there, they are no names."""

ABBREVIATIONS: Final = _set("""
mr mrs ms dr st prof jr sr no vs etc inc ltd co corp approx dept fig sen rep gen lt sgt capt rev hon mt ft ave blvd
e.g i.e a.k.a
""")
"""Words after whose full stop a sentence goes on."""
