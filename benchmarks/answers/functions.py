"""The functions that a model may call, with a sentence for each that asks for one call of it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .kinds import Kind, choice, flag, real, record, several, text, whole

PEOPLE = ("Amira", "Bruno", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hiro", "Ines", "Jonas")
CITIES = ("Oslo", "Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn", "Winnipeg", "Zagreb", "Hanoi", "Porto")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True)
class Function:
    """sentence: names every parameter in braces, where the words for its value go."""

    name: str
    description: str
    sentence: str
    parameters: dict[str, Kind]

    @property
    def schema(self) -> dict:
        return record({name: kind.schema for name, kind in self.parameters.items()})

    @property
    def tool(self) -> dict:
        function = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}

    def ask(self, rng: Random) -> tuple[str, dict]:
        """A question, and the arguments of the call that answers it."""
        drawn = {name: kind.draw(rng) for name, kind in self.parameters.items()}
        question = self.sentence.format(**{name: words for name, (_, words) in drawn.items()})
        return question, {name: value for name, (value, _) in drawn.items()}


FUNCTIONS = (
    Function(
        "get_weather",
        "Weather forecast for a city",
        "What will the weather be like in {city} over the next {days} days? Temperatures in {unit}, please.",
        {"city": text(*CITIES), "days": whole(2, 9), "unit": choice("celsius", "fahrenheit")},
    ),
    Function(
        "book_table",
        "Reserve a table in a restaurant",
        "Reserve a table for {people} people at {restaurant}, {outdoor}.",
        {
            "restaurant": text("Blue Heron", "Casa Luna", "The Old Mill", "Saffron House", "Nordic Pine"),
            "people": whole(2, 12),
            "outdoor": flag("outdoors", "indoors and not outdoors"),
        },
    ),
    Function(
        "convert_currency",
        "Convert an amount of money from one currency into another",
        "How much is {amount} {source} in {target}?",
        {
            "amount": real(12.5, 99.95, 250.75, 1310.2, 47.3),
            "source": choice("USD", "GBP", "NOK"),
            "target": choice("EUR", "JPY", "CHF"),
        },
    ),
    Function(
        "send_message",
        "Send a text message to one or more people",
        'Send the message "{body}" to {recipients}. It is {urgent}.',
        {
            "recipients": several(1, 3, *PEOPLE),
            "body": text("The train is late", "Dinner is at eight", "The keys are in the drawer", "Call me tonight"),
            "urgent": flag("urgent", "not urgent"),
        },
    ),
    Function(
        "create_event",
        "Put an event into the calendar",
        'Put "{title}" into my calendar on {date} for {minutes} minutes, with {attendees}.',
        {
            "title": text("Budget review", "Design workshop", "Garden party", "Dentist", "Choir practice"),
            "date": text("2031-03-04", "2031-07-19", "2031-11-30", "2032-01-08"),
            "minutes": whole(15, 120),
            "attendees": several(1, 3, *PEOPLE),
        },
    ),
    Function(
        "set_thermostat",
        "Set the temperature of a room in degrees celsius",
        "Set the {room} to {degrees} degrees.",
        {"room": choice("kitchen", "bedroom", "office", "bathroom"), "degrees": real(17.5, 19.0, 20.5, 21.5, 22.0)},
    ),
    Function(
        "search_products",
        "Search the shop's catalogue",
        "Find {query} for at most {max_price} euros, sorted by {sort}, {in_stock}.",
        {
            "query": text("hiking boots", "desk lamps", "coffee grinders", "rain jackets", "bicycle pumps"),
            "max_price": real(19.9, 45.5, 80.0, 149.5),
            "sort": choice("price", "rating", "newest"),
            "in_stock": flag("only what is in stock", "also what is not in stock"),
        },
    ),
    Function(
        "play_music",
        "Play the songs of an artist",
        "Play songs by {artist} at volume {volume}, {shuffle}.",
        {
            "artist": text("Nina Simone", "Miles Davis", "Bjork", "Fela Kuti", "Joni Mitchell"),
            "volume": whole(5, 95),
            "shuffle": flag("in random order with shuffle on", "in their order with shuffle off"),
        },
    ),
    Function(
        "translate_text",
        "Translate a text into another language",
        'Translate "{phrase}" into {language}.',
        {
            "phrase": text("Where is the station?", "The soup is cold.", "I lost my umbrella.", "We open at nine."),
            "language": choice("french", "spanish", "japanese", "swahili", "polish"),
        },
    ),
    Function(
        "set_alarm",
        "Set an alarm on some days of the week",
        "Set an alarm, hour {hour} and minute {minute}, on {days}.",
        {"hour": whole(5, 10), "minute": whole(1, 59), "days": several(1, 3, *DAYS, closed=True)},
    ),
    Function(
        "calculate_loan",
        "Monthly payment of a loan",
        "What do I pay each month for a loan of {principal} at {rate} per cent a year over {years} years?",
        {"principal": whole(1000, 90000), "rate": real(1.9, 3.25, 4.75, 6.5), "years": whole(2, 30)},
    ),
    Function(
        "resize_image",
        "Change the size of an image in pixels",
        "Make {file} {width} pixels wide and {height} pixels high, {keep_ratio}.",
        {
            "file": text("harbour.png", "team_photo.jpg", "logo-dark.svg", "map_2031.tif"),
            "width": whole(100, 1900),
            "height": whole(100, 1080),
            "keep_ratio": flag("keeping the ratio of its sides", "without keeping the ratio of its sides"),
        },
    ),
    Function(
        "add_to_cart",
        "Put a product into the shopping cart",
        "Put {quantity} of {item} into my cart, {gift}.",
        {
            "item": text("oat milk", "green tea", "AA batteries", "olive soap", "birthday candles"),
            "quantity": whole(1, 24),
            "gift": flag("wrapped as a gift", "not wrapped as a gift"),
        },
    ),
    Function(
        "find_flights",
        "Search for flights between two cities",
        "I need a flight from {origin} to {destination} for {passengers} passengers in {cabin} class.",
        {
            "origin": text(*CITIES[:5]),
            "destination": text(*CITIES[5:]),
            "passengers": whole(1, 6),
            "cabin": choice("economy", "business", "first"),
        },
    ),
    Function(
        "log_meal",
        "Note a meal in the food diary",
        "Note {dish} with {calories} calories as {meal}.",
        {
            "dish": text("lentil soup", "rye bread", "fried rice", "bean salad", "pancakes"),
            "calories": whole(80, 900),
            "meal": choice("breakfast", "lunch", "dinner", "snack"),
        },
    ),
    Function(
        "set_lights",
        "Dim the lights of some rooms or switch them off",
        "For the lights of {rooms}: brightness {brightness} per cent, colour {colour}.",
        {
            "rooms": several(1, 3, "kitchen", "hall", "bedroom", "cellar", "terrace", closed=True),
            "brightness": whole(1, 100),
            "colour": choice("warm", "neutral", "cold"),
        },
    ),
)
