"""Makes pairs of texts, one of which is about to say a harmful word, to fit interventions on.

An edit of the last hidden state can only change the token that comes next. So the texts to steer
away from end just before a token of a harmful word, and the model thinks this token likely. Many
such words are several tokens (`f` and `uck`); such a text may end within the word. Each has a calm
text: of all places in the model's own continuations and in Wikipedia's texts where no harmful token
is likely, the one whose last hidden state is nearest. What differs between the two is then little
more than the word to come.
"""
