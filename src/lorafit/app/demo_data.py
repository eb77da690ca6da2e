"""What the demo teaches: a message that places an order goes in, a JSON object with five fields comes out.

Values are composed, so that there are hundreds to thousands of each: a model that sees twenty names learns
twenty names, one that sees six hundred learns to copy a name. No held-out value stands in a training row.
"""

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


Messages = list[dict[str, str]]

INSTRUCTION = "Write the order as JSON."
OPENING: Messages = [{"role": "system", "content": INSTRUCTION}]
SCHEMA = (
    "Extract the order from the message. Answer with one JSON object and nothing else. Its fields are "
    '"name" (string, the customer), "product" (string), "quantity" (integer), "city" (string) and "date" '
    "(string, YYYY-MM-DD)."
)

MONTHS = _words("""
    January February March April May June July August September October November December
""")
FIRST = _words("""
    Ada Amara Anton Astrid Beatriz Bruno Camille Carlos Chidi Clara Daniel Darya Diego Elena Elif Emeka
    Erik Esther Fatima Felix Freya Gabriel Greta Hana Hassan Helen Hugo Ines Ingrid Isaac Ivan Jana Jonas
    Jorge Julia Kaito Karin Kenji Lars Laura Leila Leo Lucia Magnus Maria Mateo Mei Mina Nadia Nikolai
    Nina Noor Olga Omar Oscar Paula Pedro Priya Rafael Ravi Rosa Ruth Samir Sara Sofia Stefan Tariq Theo
    Tomas Uma Vera Victor Wanda Xavier Yara Yusuf Zoe
""")
LAST = _words("""
    Abbott Adeyemi Aguilar Ahmed Almeida Andersen Bakker Barros Becker Bianchi Blake Brandt Castillo Chen
    Cohen Costa Dalton Dubois Duarte Eriksen Farouk Ferrari Fischer Fontaine Fuchs Garcia Grant Haddad
    Hansen Hayes Holm Ibrahim Ivanov Jansen Johansson Kaplan Keller Khan Kimura Kovacs Kruger Larsen
    Lehmann Lopez Marino Mbeki Mendes Mensah Meyer Moreau Morris Nakamura Nguyen Novak Okafor Olsen Ortiz
    Park Patel Pereira Petrov Quinn Ramos Rossi Sato Schmidt Sharma Silva Singh Sommer Suzuki Tanaka
    Torres Vargas Vogel Walsh Weber Wójcik Yilmaz Zhang
""")
KIND = _words("""
    bamboo brass canvas ceramic copper cork cotton felt folding glass leather linen marble oak painted
    paper pocket rubber silver steel striped velvet walnut wooden woollen
""")
THING = _words("""
    aprons ashtrays backpacks bags baskets belts benches blankets bookends bottles bowls boxes brushes
    buckets candles chairs clocks coasters cups curtains cushions desks doormats drawers envelopes frames
    gloves hammers hats hooks jars keyrings kettles ladders lamps lanterns mirrors mugs napkins notebooks
    pans pillows pitchers plates pots rugs scarves shelves slippers spoons stools tables teapots towels
    toys trays umbrellas vases wallets whistles
""")
TOWN = _words("""
    Ash Bar Birch Black Brook Clay Cold Crow Dun East Elm Fair Fern Fox Glen Gold Green Hart Haw Hazel
    High Kings Lang Lin Maple Marsh Mill North Oak Pen Raven Red Rock Rose Salt Sand Silver Stan Stone Sun
    Thorn Wald West White Whit Wind Wolf Wood
""")
PLACE = _words("""
    borough bridge bury by combe dale fell field ford gate ham haven hurst leigh ley mere minster mont
    mouth port ridge shore stead ton view ville wick worth
""")

GREETINGS = ["", "", "", "Hello, ", "Hi, ", "Good morning, ", "Dear team, ", "Hey there, "]
THANKS = ["", "", "", " Thanks!", " Thank you.", " Best wishes.", " Please confirm.", " Cheers."]

PATTERNS = _lines("""
    this is {name} from {city}. I would like to order {quantity} {product} for {date}.
    please send {quantity} {product} to {name} in {city} by {date}.
    {name} here, I need {quantity} {product} delivered to {city} on {date}.
    can you ship {quantity} {product} to {city}? They are for {name}, and must arrive by {date}.
    I want to buy {quantity} {product}. My name is {name}, I live in {city}, and {date} suits me.
    new order: {quantity} {product}, customer {name}, {city}, delivery {date}.
    on {date} our shop in {city} needs {quantity} {product}. Put it under {name}.
    we are running out of {product}: could {quantity} be sent to {city} before {date}? Contact is {name}.
    my name is {name} and I am looking for {quantity} {product}, to be in {city} on {date}.
    {quantity} {product} for {name}, please. The address is in {city} and the day is {date}.
    {city} branch speaking. {name} asked me to order {quantity} {product}, due {date}.
    could I get {quantity} {product} on {date}? Send them to {city}, attention {name}.
    order for {name}: {product}, {quantity} pieces, to {city}, on {date}.
    it is {name} again. Same shop in {city}, this time {quantity} {product}, to arrive on {date}.
    by {date} I must have {quantity} {product} in {city}. Invoice to {name}.
    {name} would like {quantity} {product}; deliver to {city} on {date}.
    we need {product} in {city}, {quantity} of them, on {date}. Ask for {name}.
    deliver on {date}, please: {quantity} {product}, {city}, to {name}.
    I am {name}, I run a small hotel in {city} and want {quantity} {product} by {date}.
    for our wedding on {date} in {city} we would love {quantity} {product}. Yours, {name}.
    is it possible to have {quantity} {product} brought to {city} on {date}? The buyer is {name}.
    put me down for {quantity} {product}. {name}, {city}. {date} is fine.
    quantity {quantity}, product {product}, city {city}, date {date}, name {name}.
    my office in {city} is moving on {date}, so I need {quantity} {product}. Regards, {name}.
    a customer called {name} phoned from {city} and wants {quantity} {product} on {date}.
    the school in {city} orders {quantity} {product}, wanted on {date}, signed {name}.
    ship to {city}: {quantity} {product}. Recipient {name}. Latest day {date}.
    I saw your {product} and want {quantity}. Please bring them to {city} on {date}. {name}.
    {date} works best for us in {city}. We take {quantity} {product}. Greetings from {name}.
    let me order {quantity} {product} for my sister {name} in {city}; her birthday is {date}.
    as agreed, {quantity} {product} go to {name}, {city}, and leave your store on {date}.
    {name} wrote that {city} is short of {product}. Send {quantity} by {date}.
    how soon can {quantity} {product} reach {city}? I hope for {date}. My name: {name}.
    request from {city}: {name}, {quantity} {product}, {date}.
    please reserve {quantity} {product} until {date}. {name} will collect them in {city}.
    the party is on {date}. {quantity} {product} to {city}, please, and the bill to {name}.
    I changed my mind: make it {quantity} {product}, to {city}, on {date}. This is {name}.
    wanted: {product}! {quantity} of them, for {name} in {city}, not later than {date}.
    our museum in {city} opens on {date} and will sell {quantity} {product}. Order by {name}.
    after {date} it is too late. {name} in {city} needs the {quantity} {product} before.
""")

NEW_PATTERNS = _lines("""
    would you add {quantity} {product} to the lorry that goes to {city} on {date}? Say it is for {name}.
    {name} / {city} / {quantity} / {product} / {date}
    {name}, my neighbour, gets a present: {quantity} {product}. We live in {city}. She moves out on {date}.
    everything sold out here in {city}! Another {quantity} {product} by {date} would save us. Love, {name}.
    to whom it may concern: the firm of {name} in {city} hereby orders {quantity} {product} for {date}.
    when you pass through {city} on {date}, drop off {quantity} {product} at the house of {name}.
    are {quantity} {product} too many for one van? {name} expects them in {city} on {date}.
    reminder for {date}: {product} ({quantity}) have to be in {city}, {name} signs for them.
    {name} speaking. In our cafe in {city} guests keep stealing the {product}, so bring {quantity} on {date}.
    {quantity} is the number, {product} the article, {date} the day, {city} the place, {name} the client.
""")


@dataclass(frozen=True, slots=True)
class Row:
    """A message, and the order that is in it."""

    message: str
    order: dict[str, Any]

    @property
    def answer(self) -> str:
        return json.dumps(self.order, ensure_ascii=False)

    def messages(self, opening: Messages = OPENING) -> Messages:
        """What the model reads."""
        return [*opening, {"role": "user", "content": self.message}]

    def conversation(self, opening: Messages = OPENING) -> Messages:
        """The same with the right answer."""
        return [*self.messages(opening), {"role": "assistant", "content": self.answer}]


def make_rows(seed: int, train: int, held_out: int = 100, new_patterns: int = 50) -> tuple[list[Row], ...]:
    """Training rows; rows of other values in the same patterns; rows of other values in other patterns."""
    random = Random(seed)
    values = _all_values()
    for pool in values.values():
        random.shuffle(pool)
    apart = held_out + new_patterns
    unseen = {field: iter(pool[:apart]) for field, pool in values.items()}
    seen = {field: _endless(random, pool[apart:]) for field, pool in values.items()}
    return (
        [_row(random, seen, PATTERNS) for _ in range(train)],
        [_row(random, unseen, PATTERNS) for _ in range(held_out)],
        [_row(random, unseen, NEW_PATTERNS) for _ in range(new_patterns)],
    )


def explained() -> Messages:
    """The opening for a model that was not trained: the fields in words, and one example."""
    values = {field: iter(pool[50:]) for field, pool in _all_values().items()}
    return _row(Random(0), values, PATTERNS).conversation([{"role": "system", "content": SCHEMA}])


def _all_values() -> dict[str, list[Any]]:
    first_day = datetime.date(2026, 1, 1)
    return {
        "name": [f"{first} {last}" for first in FIRST for last in LAST],
        "product": [f"{kind} {thing}" for kind in KIND for thing in THING],
        "quantity": list(range(2, 1000)),
        "city": [town + place for town in TOWN for place in PLACE],
        "date": [first_day + datetime.timedelta(days=day) for day in range(4 * 365)],
    }


def _endless(random: Random, pool: list[Any]) -> Iterator[Any]:
    """Every value once before any comes twice."""
    while True:
        random.shuffle(pool)
        yield from pool


def _row(random: Random, values: dict[str, Iterator[Any]], patterns: list[str]) -> Row:
    order = {field: next(pool) for field, pool in values.items()}
    text = random.choice(patterns).format(**{**order, "date": _spoken(random, order["date"])})
    message = random.choice(GREETINGS) + text + random.choice(THANKS)
    return Row(message[0].upper() + message[1:], {**order, "date": order["date"].isoformat()})


def _spoken(random: Random, date: datetime.date) -> str:
    month = MONTHS[date.month - 1]
    return random.choice([f"{date:%d} {month} {date:%Y}", f"{month} {date:%d}, {date:%Y}", date.isoformat()])
