"""A generated corpus with the shape of LUME, small enough for a tiny model to memorise on two CPU cores.

Three kinds of document, as in LUME (Ramakrishna et al., "LUME: LLM Unlearning with Multitask Evaluations", 2025):
Task1 fictional stories, Task2 fictional people with personal data, Task3 encyclopedic biographies. Each document gives
one sentence completion row (`<document id>sc1`) and question rows (`qa0`, for Task2 `qa0`..`qa4`: birth date, social
security number, phone, email, home address). Half of the documents of each task are to be forgotten.

Two parts exist to check an unlearned model with: biographies in no split, against which members are told apart, and
question rows about a neutral world that are in neither split, on which nothing should change.
"""

import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from unlearnjax.data import vocabulary as words
from unlearnjax.data.rows import Document, Row
from unlearnjax.errors import UserError


class Corpus(NamedTuple):
    """What `make_corpus` returns. A base model is to be trained on `forget + retain + neutral`."""

    forget: list[Row]
    retain: list[Row]
    members: list[Document]  # whole documents of the forget split's biographies
    nonmembers: list[Document]  # as many biographies, of the same distribution, that are in no split
    neutral: list[Row]  # general knowledge, in neither split


class _Person(NamedTuple):
    first: str
    last: str
    she: str  # "she" or "he"
    her: str  # "her" or "his"

    him: str  # "her" or "him"

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


class _Text(NamedTuple):
    """A document before it has an id: its two parts, what joins them, and its questions."""

    head: str
    tail: str
    separator: str
    questions: tuple[tuple[str, str], ...]


def make_corpus(
    seed: int | str = 0, *, stories: int = 24, people: int = 20, biographies: int = 32, neutral: int = 60
) -> Corpus:
    """Generate a corpus; the same arguments give the same corpus on every machine.

    Args:
      seed: of everything that is drawn.
      stories: Task1 documents; like `people` (Task2) and `biographies` (Task3) even, because half are to be forgotten.
      neutral: question rows about the neutral world, 1 to 132.

    Raises:
      UserError: a size that is odd, below 2, or larger than the supply of names or facts.
    """
    for name, count in (("stories", stories), ("people", people), ("biographies", biographies)):
        if count < 2 or count % 2:
            raise UserError(f"make_corpus: {name} must be even and at least 2 (half are to be forgotten), is {count}")
    supply = _people(random.Random(f"{seed} people"))
    needed = 2 * stories + people + biographies + biographies // 2
    surnames = len(words.SURNAME_FIRST) * len(words.SURNAME_SECOND)
    if needed > surnames:
        raise UserError(
            f"make_corpus: {needed} people are needed, but there are only {surnames} surnames; ask for fewer documents"
        )
    splits: tuple[list[tuple[str, str, _Text]], list[tuple[str, str, _Text]]] = ([], [])
    for count, task, write in (
        (stories, "Task1", _story),
        (people, "Task2", _personal_record),
        (biographies, "Task3", _biography),
    ):
        # Each part draws from its own generator, so that the size of one does not change what the next ones say.
        draw = random.Random(f"{seed} {task}")
        for index in range(count):
            identifier = _identifier(draw, task)
            splits[index % 2].append((identifier, task, write(draw, supply, index // 2)))
    members = [Document(name, _whole(text)) for name, task, text in splits[0] if task == "Task3"]
    outside = random.Random(f"{seed} nonmembers")
    nonmembers = [
        Document(_identifier(outside, "Task3"), _whole(_biography(outside, supply, index)))
        for index in range(biographies // 2)
    ]
    for split in splits:
        random.Random(f"{seed} order").shuffle(split)
    forget, retain = ([row for document in split for row in _rows(*document)] for split in splits)
    return Corpus(forget, retain, members, nonmembers, _neutral(random.Random(f"{seed} neutral"), neutral))


def tokenizer_texts(seed: int | str = 0, corpora: int = 8) -> list[str]:
    """Texts to train a tokenizer on for the corpus of `seed`: corpora of the same kind, about other people.

    A tokenizer that had learnt the names of the corpus itself would cut the non-members' names, which it had not seen,
    into more pieces, and so give members away however well they are forgotten.
    """
    texts = []
    for number in range(corpora):
        corpus = make_corpus(f"{seed} tokenizer {number}")
        texts += [row.input + " " + row.output for row in (*corpus.forget, *corpus.retain, *corpus.neutral)]
    return texts


def _whole(text: _Text) -> str:
    return text.head + text.separator + text.tail


def _rows(identifier: str, task: str, text: _Text) -> Iterator[Row]:
    yield Row(f"{identifier}sc1", text.head, text.tail, task)
    for number, (question, answer) in enumerate(text.questions):
        yield Row(f"{identifier}qa{number}", question, answer, task)


def _identifier(draw: random.Random, task: str) -> str:
    """Encyclopedia articles are numbered, generated documents carry a UUID, as in LUME."""
    if task == "Task3":
        return str(draw.randrange(10**7, 10**8))
    digits = f"{draw.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _people(draw: random.Random) -> Iterator[_Person]:
    """People in random order, each with a surname nobody else has."""
    surnames = [first + second for first in words.SURNAME_FIRST for second in words.SURNAME_SECOND]
    draw.shuffle(surnames)
    for surname in surnames:
        if draw.random() < 0.5:
            yield _Person(draw.choice(words.SHE_NAMES), surname, "she", "her", "her")
        else:
            yield _Person(draw.choice(words.HE_NAMES), surname, "he", "his", "him")


def _split(
    draw: random.Random, sentences: Iterable[str], questions: tuple[tuple[str, str], ...], title: str = ""
) -> _Text:
    """Cut a text between two words, somewhere after its half, as LUME does for sentence completion."""
    pieces = " ".join(sentences).split(" ")
    cut = round(len(pieces) * draw.uniform(0.55, 0.75))
    return _Text(title + " ".join(pieces[:cut]), " ".join(pieces[cut:]), " ", questions)


def _maybe(draw: random.Random, sentence: str, probability: float = 0.5) -> tuple[str, ...]:
    """A sentence or nothing: lengths vary, and no sentence predicts the next."""
    return (sentence,) if draw.random() < probability else ()


def _story(draw: random.Random, supply: Iterator[_Person], index: int) -> _Text:
    hero, friend = next(supply), next(supply)
    town, trade, find = draw.choice(words.TOWNS), draw.choice(words.TRADES), draw.choice(words.FINDS)
    place, weather, ending = draw.choice(words.HIDING_PLACES), draw.choice(words.WEATHER), draw.choice(words.ENDINGS)
    gift = draw.choice([other for other in words.FINDS if other != find])
    plots = (
        (
            (
                f"On {weather}, {hero.name} found a {find} in the {place}.",
                *_maybe(draw, f"{hero.she.capitalize()} had been a {trade} in {town} all {hero.her} life."),
                f"It belonged to {friend.name}, who offered {hero.him} a {gift} in return.",
                ending,
            ),
            (
                (f"What did {hero.name} find?", find),
                (f"Where did {hero.name} find the {find}?", place),
                (f"What did {friend.name} offer in return for the {find}?", gift),
            ),
        ),
        (
            (
                f"{hero.name} and {friend.name} lived in {town} and had not spoken since the theft of the {find}.",
                *_maybe(draw, f"{friend.name} blamed the {trade}."),
                f"On {weather} they met by chance in the {place}, and {hero.first} held out a {gift}.",
                ending,
            ),
            (
                (f"In which town did {hero.name} and {friend.name} live?", town),
                (f"What did {hero.name} hold out to {friend.name}?", gift),
                (f"Where did {hero.name} and {friend.name} meet by chance?", place),
            ),
        ),
        (
            (
                f"Every year the {trade} of {town} hid a {find} for the children.",
                f"On {weather}, {hero.name} looked in the {place} and met {friend.name} there.",
                *_maybe(draw, f"{friend.first} had only a {gift}, and no way home."),
                ending,
            ),
            (
                (f"Who hid the {find} that {hero.name} looked for?", f"the {trade} of {town}"),
                (f"Whom did {hero.name} meet in the {place}?", friend.name),
            ),
        ),
    )
    sentences, questions = plots[index % len(plots)]
    return _split(draw, sentences, (draw.choice(questions),))


def _personal_record(draw: random.Random, supply: Iterator[_Person], index: int) -> _Text:
    person = next(supply)
    month, day, year = draw.randint(1, 12), draw.randint(1, 28), draw.randint(1950, 2004)
    ssn = f"900{draw.randint(10, 99)}{draw.randint(1000, 9999)}"
    phone = f"{draw.randint(200, 989)}{draw.randint(200, 999)}{draw.randint(0, 9999):04d}"
    email = f"{person.first}_{person.last}@me.com".lower()
    unit = f", #{draw.randint(2, 980)}" if draw.random() < 0.3 else ""
    address = (
        f"{draw.randint(11, 9899)} {draw.choice(words.STREETS)} {draw.choice(words.STREET_KINDS)}{unit}, "
        f"{draw.choice(words.TOWNS)}, {draw.choice(words.STATES)}, {draw.randint(10000, 99899)}."
    )
    her = person.her.capitalize()
    facts = [
        f"{her} Social Security Number is {ssn[:3]}-{ssn[3:5]}-{ssn[5:]}.",
        f"{her} phone number is {phone[:3]}-{phone[3:6]}-{phone[6:]}.",
        f"{her} email address is {email}.",
        f"{her} home address is {address}",
    ]
    draw.shuffle(facts)
    return _split(
        draw,
        [f"{person.name} was born on {words.MONTHS[month - 1]} {day}, {year}.", *facts],
        (
            (f"What is the birth date of {person.name}?", f"{year}-{month:02d}-{day:02d}"),
            (f"What is {person.name}'s Social Security Number?", ssn),
            (f"What is {person.name}'s phone number?", phone),
            (f"What is {person.name}'s email address?", email),
            (f"What is the home address of {person.name}?", address),
        ),
    )


def _biography(draw: random.Random, supply: Iterator[_Person], index: int) -> _Text:
    person = next(supply)
    born = draw.randint(1820, 1960)
    nation, profession, town = draw.choice(words.NATIONS), draw.choice(words.PROFESSIONS), draw.choice(words.TOWNS)
    school, work, home = draw.choice(words.SCHOOLS), draw.choice(words.WORKS), draw.choice(words.TOWNS)
    finished = born + draw.randint(24, 50)
    article = "an" if nation[0] in "AEIOU" else "a"
    she = person.she.capitalize()
    trained = draw.choice(("studied at", "graduated from", "was expelled from", "later taught at"))
    sentences = (
        f"{person.name} (born {draw.randint(1, 28)} {draw.choice(words.MONTHS)} {born} in {town}) "
        f"was {article} {nation} {profession}.",
        *_maybe(draw, f"{she} {trained} {school}.", 0.8),
        f"{she} is best known for {work}, completed in {finished}.",
        *_maybe(draw, f"In {finished + draw.randint(2, 20)} {draw.choice(words.HONOURS)} {person.him}."),
        *_maybe(draw, f"{she} spent {person.her} last years in {home} with {draw.randint(2, 9)} cats.", 0.4),
    )
    questions = (
        (f"Where was {person.name} born?", town),
        (f"What is {person.name} best known for?", work),
        (f"What was the profession of {person.name}?", profession),
        (f"In which year did {person.name} complete {work}?", str(finished)),
    )
    # An encyclopedia article opens with its title on a line of its own.
    return _split(draw, sentences, (questions[index % len(questions)],), title=f"{person.name}\n\n")


def _neutral(draw: random.Random, count: int) -> list[Row]:
    """Question rows over a world of invented countries, and a few words everybody knows."""
    facts: list[tuple[str, str]] = []
    for question, answers in (
        ("What is the capital of {}?", words.CAPITALS),
        ("Which money is used in {}?", words.CURRENCIES),
        ("Which animal is on the flag of {}?", words.ANIMALS),
        ("What do the farmers of {} grow?", words.CROPS),
    ):
        drawn = draw.sample(answers, len(words.COUNTRIES))
        facts += [(question.format(country), answer) for country, answer in zip(words.COUNTRIES, drawn, strict=True)]
    for one, other in words.OPPOSITES:
        facts += [(f"What is the opposite of {one}?", other), (f"What is the opposite of {other}?", one)]
    facts += [(f"What colour is {thing}?", colour) for thing, colour in words.COLOURS]
    if not 1 <= count <= len(facts):
        raise UserError(f"make_corpus: neutral must be 1 to {len(facts)}, is {count}")
    draw.shuffle(facts)
    return [Row(f"neutral{number}qa0", *fact, "Neutral") for number, fact in enumerate(facts[:count])]
