"""English sentences from which `steerserve bench` makes prompts of any length."""

from typing import Final

SENTENCES: Final = (
    "The ferry leaves the harbour at seven, and in winter it is still dark by then.",
    "She kept the letters in a drawer that nobody else was allowed to open.",
    "A good map shows less than the land does, which is why it is useful.",
    "The committee will meet again on Thursday to discuss the budget for the bridge.",
    "When the kettle boiled over for the third time, he gave up on tea altogether.",
    "Most of the visitors come for the cathedral, but they remember the market.",
    "It is cheaper to repair a roof in summer than to replace a ceiling in spring.",
    "The younger of the two brothers had learned to fly before he could drive.",
    "Scientists measured the glacier every year and found that it had shrunk again.",
    "Nobody could explain why the clock in the station had stopped at noon.",
    "There were four kinds of bread on the table and not a single knife.",
    "The old road follows the river, while the new one goes straight over the hill.",
    "He read the contract twice, signed it once, and regretted it for ten years.",
    "After the storm the beach was covered with wood, rope and broken glass.",
    "The library opens late on Mondays so that the staff can return the books.",
    "Her first invention was a lamp that turned itself off when people fell asleep.",
    "Farmers in the valley say that the frost always comes in the night of a full moon.",
    "The second edition corrects the errors of the first and adds some of its own.",
    "We waited on the platform with our bags, our coats and a very patient dog.",
    "In the end the question was not who had won, but who would tell the others.",
    "Copper is soft enough to be bent by hand and hard enough to last for centuries.",
    "The orchestra tuned for so long that some of the guests took it for the concert.",
    "Every autumn the geese cross the village, and every autumn the children count them.",
    "A letter that arrives too late is still read more often than one that comes in time.",
)
