"""The sentences of the storyteller's language: templates with slots, by section of a story.

The generator and the checker both read this file. How a template is written:
- `{thing}` is a slot for any word of that category (lexicon.py). Some slots keep one word for the whole story: `{X}`
  its thing, `{F}` its food, `{P}` the place where it happens, `{home}` a place, `{K}` a skill, `{kindA}` and
  `{kindB}` the animals.
- `{A}` is the name of the sentence's subject, `{B}` that of the other character; `{he} {him} {his}` agree with A and
  `{he2} {him2} {his2}` with B. A leading `~` says that the story's friend, not its hero, is the subject.
- `[one*3|two]` chooses, with weights; MACROS are abbreviations, and may hold choices themselves.
- `{a}` is "a" or "an", by the next word. The first word of a sentence and of a quotation gets its capital by itself.
A quotation holds one sentence, and what follows it starts with a small letter, so that the end of a sentence can be
seen without parsing.
"""

from __future__ import annotations


def _stack(slot: str) -> str:
    """One to three adjectives of one category: the room in which a story can alliterate."""
    return f"[{{{slot}}}*4|{{{slot}}} {{{slot}}}*4|{{{slot}}} {{{slot}}} {{{slot}}}*2]"


MACROS: dict[str, str] = {
    "{S}": "[{A}*6|{he}*6|{A} the {kindA}*2|{A} the {trait} {kindA}*2|the {trait} {kindA}]",
    "{O}": "[{B}*4|{B} the {kindB}|{B} the {trait} {kindB}]",
    "{both}": "[{A} and {B}*2|they*2|the two friends|the {kindA} and the {kindB}]",
    "{tag}": "[{say} {A}*3|{he} {say}*2|{he} {manner} {say}|{say} {A} {manner}*2|"
    "{say} {A} the {kindA}|{say} the {trait} {kindA}]",
    "{traits}": _stack("trait"),
    "{looks}": _stack("look"),
    "{tastes}": _stack("taste"),
    "{scenes}": _stack("scene"),
    "{look?}": "[|{look}|{look} {look}]",
    "{manners}": "[{manner}*3|{manner}, {manner}]",
}

SECTIONS: dict[str, str] = {
    "once": """
        Once upon a time, there was {a} {traits} {kindA} named {A}.
        Once upon a time, there lived {a} {traits} {kindA} called {A}.
        Once upon a time there was {a} {traits} {kindA} called {A}.
        Once upon a time {a} {traits} {kindA} named {A} lived {near} {a} {scenes} {home}.
        Once upon a time, {near} {a} {scenes} {home}, there lived {a} {traits} {kindA} named {A}.
        Once upon a time, {A} the {traits} {kindA} lived {near} the {scenes} {home}.
        Once upon a time, one {weather} {time}, {a} {traits} {kindA} named {A} woke up.
        Once upon a time, {A} was {a} {traits} {kindA}.
        """,
    "opening": """
        There once was {a} {traits} {kindA} named {A}.
        Long ago, {near} {a} {scenes} {home}, there lived {a} {traits} {kindA} named {A}.
        Long, long ago, {A} the {traits} {kindA} lived {near} {a} {scenes} {home}.
        {A} was {a} {traits} {kindA} who lived {near} {a} {scenes} {home}.
        In a land far away lived {a} {traits} {kindA} called {A}.
        This is the story of {A}, {a} {traits} {kindA}.
        Many years ago, {a} {traits} {kindA} named {A} lived {near} the {scenes} {home}.
        Everybody {near} the {scenes} {home} knew {A}, the {traits} {kindA}.
        One {weather} {time}, {a} {traits} {kindA} named {A} woke up {near} {a} {scenes} {home}.
        Do you know {A}, the {traits} {kindA}?
        """,
    "character": """
        {S} loved to {skill}, {skill} and {skill}.
        {S} loved {traits} friends and {tastes} {food}.
        Every {time}, {S} {manner} {go} to the {scenes} {place}.
        Every {weather} {time}, {S} {handle} {number} {tastes} {food}.
        Everyone said that {S} was {trait}, {trait} and {trait}.
        Nobody {near} the {scenes} {place} could {skill} like {A}.
        {S} always carried {a} {looks} {thing}.
        {S} kept {a} {looks} {thing} and {a} {looks} {thing} {near} the {place}.
        {S} {cheer} {manners} all day long.
        {S} had {a} {looks} {thing} and {number} {tastes} {food}.
        All day, {S} {cheer}, {cheer} and {cheer}.
        For breakfast, {S} ate {number} {tastes} {food}.
        {his} {scenes} house stood {near} {a} {scenes} {place}.
        {S} was {trait}, but {he} was never {trait}.
        """,
    "wish": """
        More than anything, {S} wanted to {want} {a} {looks} {X}.
        {S} {manner} wished for {a} {looks} {X}.
        One {weather} {time}, {S} wanted to {want} {a} {looks} {X}.
        {S} {manner} dreamed of {a} {looks} {X}.
        One {time}, {S} heard about {a} {looks} {X} {near} {a} {scenes} {P}.
        {S} had always wanted to {want} {a} {looks} {X}.
        "I would love to {want} {a} {looks} {X}," {tag}.
        "If only I had {a} {looks} {X}!" {tag}.
        {S} had no {X}, so {he} {manner} planned to {want} one.
        In a {weather} dream, {S} {find} {a} {looks} {X}.
        {his} mother told {him} about {a} {looks} {X} {near} {a} {scenes} {P}.
        """,
    "treasure": """
        {S} had {a} {looks} {X}.
        {S} {manner} {handle} {his} {looks} {X} every {time}.
        For {his} birthday, {S} got {a} {looks} {X}.
        {his} {looks} {X} made {him} {glad}, {glad} and {glad}.
        One {weather} {time}, {S} {manner} {find} {a} {looks} {X}.
        {his} father gave {him} {a} {looks} {X}.
        {S} loved {his} {looks} {X} more than {number} {tastes} {food}.
        "What {a} {looks} {X} I have!" {tag}.
        {S} {manner} took {his} {looks} {X} to the {scenes} {P}.
        """,
    "study": """
        {S} wanted to learn to {K}.
        One {weather} {time}, {S} tried to {K} {near} {a} {scenes} {P}.
        "I wish that I could {K}," {tag}.
        {S} could {skill} and {skill}, but {he} could not {K}.
        {S} {manner} dreamed that {he} could {K}.
        Every {traits} {kind} could {K}, but {A} could not.
        "Today I will learn to {K}," {tag}.
        {S} {manner} practiced how to {K} {near} the {scenes} {P}.
        """,
    "feast": """
        One {weather} {time}, {S} baked {number} {tastes} {F}.
        {S} had {number} {tastes} {F}.
        {his} mother gave {him} {number} {tastes} {F}.
        {S} {manner} {find} {number} {tastes} {F} {near} {a} {scenes} {P}.
        "I could eat {number} {tastes} {F}," {tag}.
        {S} {manner} put {number} {tastes} {F} into {a} {looks} {X}.
        For lunch, {S} {manner} cooked {number} {tastes} {F}.
        {S} {manner} took {number} {tastes} {F} to the {scenes} {P}.
        """,
    "noise": """
        One {weather} {time}, {S} heard a {trait} noise {near} the {scenes} {P}.
        "What is that noise {near} the {scenes} {P}?" {tag}.
        Something {trait} {manner} {go} {near} the {scenes} {P}.
        One {time}, {S} saw {a} {traits} shadow {near} {a} {scenes} {P}.
        {S} was afraid of the {scenes} {P}.
        Something {traits} {manner} {weep} {near} the {P}.
        "{a} {traits} dragon lives {near} the {P}," {tag}.
        Every {time}, something {manner} {weep} {near} the {scenes} {P}.
        """,
    "journey": """
        So {S} {manners} {go} to the {scenes} {P}.
        One {weather} {time}, {S} {manner} {go} to the {scenes} {P}.
        {S} {go} past {a} {scenes} {place} and {a} {scenes} {place}.
        {S} {manners} {go} toward the {scenes} {P}.
        {S} packed {number} {tastes} {food} and {manner} {go} away.
        {S} {go} and {go} until {he} came to {a} {scenes} {P}.
        Past the {scenes} {place} {S} {manner} {go}.
        {S} {handle} {his} {looks} {thing} and {manner} {go} to the {P}.
        That {weather} {time}, {S} {manner} {go} {near} the {scenes} {P}.
        All {time}, {S} {go}, {go} and {go}.
        {S} did not stop until {he} {manner} reached the {scenes} {P}.
        The path to the {P} was {scene}, {scene} and {scene}.
        {S} waved to {a} {traits} {kind} and {manner} {go} away.
        """,
    "slip": """
        But {near} the {scenes} {place}, {S} tripped over {a} {looks} {thing}.
        Suddenly, {S} slipped and {spoil} {his} {looks} {thing}.
        But the {scenes} {P} was empty, and {S} {weep}.
        {a} {weather} wind blew, and {S} {spoil} {his} {looks} {thing}.
        {S} {go} so {manner} that {he} {spoil} {his} {looks} {thing}.
        Oh dear, {S} {manner} sat on {a} {looks} {thing}!
        Then {S} lost {his} way {near} {a} {scenes} {place}.
        It began to rain, and {S} {manner} {weep}.
        {S} {manner} ran into {a} {traits} {kind} and fell down.
        But {S} {spoil} {a} {looks} {thing} {near} the {scenes} {place}.
        """,
    "loss": """
        One {weather} {time}, {S} {manner} {spoil} the {look?} {X}.
        But {a} {weather} wind blew the {X} toward {a} {scenes} {place}.
        Then {S} tripped over {a} {looks} {thing} and {spoil} the {X}.
        "Oh no, I {spoil} my {looks} {X}!" {tag}.
        But {near} the {scenes} {P}, {S} {spoil} the {look?} {X}.
        {a} {traits} {kind} {manner} {spoil} the {look?} {X}.
        One {time}, the {look?} {X} fell into {a} {scenes} {place}.
        {S} {go} so {manner} that {he} {spoil} the {X}.
        "Where is my {looks} {X}?" {tag}.
        """,
    "fail": """
        But {S} {manner} fell on {a} {looks} {thing}.
        {S} tried and tried, but {he} only {weep}.
        But {he} {manner} {go} into {a} {scenes} {place}!
        {S} tried {number} times, but {he} {spoil} {a} {looks} {thing}.
        "This is too hard for {a} {traits} {kindA}," [{say} {A}|{he} {say}|{he} {manner} {say}].
        {a} {traits} {kind} laughed at {him}.
        {S} tried to {K} with {a} {looks} {thing}, but {he} fell down.
        """,
    "sorrow": """
        {S} was {sad}, {sad} and {sad}.
        {S} {manners} {weep}.
        {S} sat {near} {a} {scenes} {place} and {manner} {weep}.
        {S} felt {sad} and {sad}.
        "What shall I do now?" {tag}.
        Poor {A} {weep}, {weep} and {weep}.
        {S} was so {sad} that {he} {manner} {weep}.
        "I feel so {sad}," {tag}.
        It made {him} {sad} and {sad}.
        No {kind} was ever as {sad} as {A}.
        """,
    "meeting": """
        ~Just then, {a} {traits} {kindA} named {A} {manner} {go} by.
        {S} met {a} {traits} {kindB} named {B}.
        ~Along came {A}, {a} {traits} {kindA} with {a} {looks} {thing}.
        {S} {find} {a} {traits} {kindB} named {B} {near} {a} {scenes} {place}.
        ~{a} {traits} {kindA} named {A} {manner} {go} over to {B}.
        Soon {S} {manner} {find} {B}, {a} {traits} {kindB}.
        ~"Hello, my name is {A}," {say} {a} {traits} {kindA}.
        ~Out of {a} {scenes} {place} {go} {a} {traits} {kindA} named {A}.
        {S} bumped into {a} {traits} {kindB} named {B}.
        ~Then {A}, {a} {traits} {kindA}, saw {B} and {manner} stopped.
        """,
    "offer": """
        ~"Do not worry, {B}," {tag}.
        ~"Why are you so {sad}, {B}?" {tag}.
        ~"I can help you, {trait} {kindB}," {tag}.
        ~"Take my {looks} {thing}, {B}," {tag}.
        ~"{a} {weather} {time} to you, {trait} {kindB}!" {tag}.
        ~{S} {manner} gave {B} {a} {looks} {thing}.
        ~{S} {manner} told {O} about {a} {scenes} {place}.
        "Can you help me, {trait} {kindB}?" {tag}.
        {S} told {O} about the {scenes} {P}.
        {S} {manner} asked {O} for {a} {looks} {thing}.
        ~{S} {manner} shared {number} {tastes} {food} with {O}.
        ~"Let us eat {number} {tastes} {food} first," {tag}.
        """,
    "gain": """
        ~{S} {manner} pointed to {a} {looks} {X} {near} the {scenes} {P}.
        {S} {manner} helped {O} to {mend} {a} {looks} {thing}, and {he2} gave {him} {a} {X}.
        Together {both} {go} to the {scenes} {P} and {find} {a} {look?} {X}.
        ~"Here is {a} {looks} {X} for you, {B}," {tag}.
        {near} {a} {scenes} {place}, {both} {manner} {find} {a} {looks} {X}.
        ~{S} {manner} gave {O} {a} {looks} {X}.
        ~{S} opened {a} {looks} {thing}, and there was {a} {looks} {X}!
        {S} traded {number} {tastes} {food} for {a} {looks} {X}.
        """,
    "repair": """
        ~{S} {manner} helped {O} to {mend} the {look?} {X}.
        Together {both} {manner} {go} out to {mend} the {X}.
        {near} {a} {scenes} {place}, {both} {find} the {look?} {X}.
        ~{S} {manner} used {a} {looks} {thing} to {mend} the {X}.
        ~"Look, here is your {looks} {X}!" {tag}.
        ~{S} {go} to the {scenes} {place} and {manner} {find} the {X}.
        ~"Let us {mend} the {X} with {a} {looks} {thing}," {tag}.
        {both} {manner} {handle} the {look?} {X} until it was as good as new.
        """,
    "lesson": """
        ~{S} {manner} taught {O} to {K}.
        ~"Hold {a} {looks} {thing} and {K} {manner}," {tag}.
        {both} {manner} practiced {near} {a} {scenes} {place}.
        ~{S} showed {O} how to {K} {manner}.
        {S} watched {B} and {manner} tried to {K} again.
        ~"You must {K} {manner}, {trait} {kindB}," {tag}.
        With the help of {B}, {S} could {K} {manners}.
        After {number} days, {S} could {K} {manners}.
        """,
    "hunger": """
        ~{S} was hungry and {sad}.
        ~"I have not eaten for {number} days," {tag}.
        ~"May I have {number} {F}?" {tag}.
        ~{S} {manner} looked at the {tastes} {F}.
        ~{S} had only {a} {looks} {thing} to eat.
        ~"How I love {tastes} {F}!" {tag}.
        ~{S} smelled the {tastes} {F} and {manner} {weep}.
        """,
    "share": """
        {S} {manner} shared the {tastes} {F} with {O}.
        {S} {manner} gave {O} {number} {tastes} {F}.
        "Please eat my {tastes} {F}, {trait} {kindB}," {tag}.
        {both} sat {near} {a} {scenes} {place} and ate the {F} {manner}.
        {S} gave the {tastes} {F} to {O} and {manner} {cheer}.
        {both} ate {number} {tastes} {F} and {number} {tastes} {food}.
        {S} put the {tastes} {F} {near} {a} {looks} {thing}, and they ate.
        """,
    "reveal": """
        ~But it was only {A}, {a} {traits} {kindA}!
        {S} looked {near} {a} {scenes} {place} and found {a} {traits} {kindB} named {B}.
        ~The noise came from {a} {traits} {kindA} named {A}.
        {S} {manner} raised {a} {looks} {thing} and saw {B}, {a} {traits} {kindB}.
        ~It was just {a} {traits} {kindA} named {A} with {a} {looks} {thing}.
        ~"Do not be afraid of me, I am {A}," {say} {a} {traits} {kindA}.
        """,
    "thorn": """
        ~{S} had lost {his} {looks} {X}.
        ~"I am {sad} and {sad}," {tag}.
        ~"I only wanted to {want} {a} {looks} {X}," {tag}.
        ~{S} {manner} {weep} because {he} was {sad}.
        ~"Nobody plays with {a} {traits} {kindA} like me," [{say} {A}|{he} {say}|{he} {manner} {say}].
        ~{S} was looking for {a} {looks} {X}.
        """,
    "kindness": """
        {S} {manner} gave {O} {a} {looks} {X}.
        {S} {manner} {handle} {a} {looks} {thing} for {O}.
        "You are {a} {traits} {kindB}, {B}," {tag}.
        "Let us {skill} and {skill} together," {tag}.
        {both} {manner} {go} to the {scenes} {place}.
        {S} shared {number} {tastes} {food} with {O}.
        "Come and {skill} with me, {trait} {kindB}," {tag}.
        """,
    "joy": """
        {S} was {glad}, {glad} and {glad}.
        {S} {manners} {cheer}.
        {S} was so {glad} that {he} {manner} {cheer}.
        "Thank you, {traits} {kindB}!" {tag}.
        {both} {cheer}, {cheer} and {cheer}.
        {both} {manner} {cheer} {near} the {scenes} {place}.
        "You are {a} {traits} friend, {B}," {tag}.
        "I am so {glad}," {tag}.
        {both} {cheer} and ate {number} {tastes} {food}.
        {S} {manner} {handle} {his} {looks} {thing} and {cheer}.
        {S} hugged {O} and {manner} {cheer}.
        {S} {manner} gave {O} {number} {tastes} {food}.
        How {glad} {A} and {B} were!
        """,
    "ending": """
        And they lived happily ever after.
        From that {time} on, {A} and {B} were {trait}, {trait} friends.
        Every {weather} {time}, {both} {manner} {go} to the {scenes} {P} together.
        That night, {S} dreamed of {a} {looks} {thing} and {a} {traits} {kind}.
        {S} {manner} {go} home and slept {near} {a} {looks} {thing}.
        {S} learned that {a} {traits} friend is better than {a} {looks} {thing}.
        And {A} the {traits} {kindA} was never {sad} again.
        {both} were the best of friends {near} the {scenes} {P}.
        In the end, {both} {manner} {go} home.
        Then {both} {manner} {go} home for {number} {tastes} {food}.
        And so {A} the {traits} {kindA} found {a} {traits} friend.
        To this {time}, {both} {skill} {near} the {scenes} {P}.
        "{trait} friends are the best friends," {tag}.
        """,
    "close": """
        The end.
        """,
}

# The plots: sections in order. A number after a section is the share of stories that have it (else all have it).
PLOTS: dict[str, str] = {
    "wish": "opening character:0.5 wish journey slip sorrow:0.5 meeting offer:0.7 gain joy ending close:0.2",
    "loss": "opening character:0.4 treasure journey:0.4 loss sorrow meeting offer repair joy ending close:0.2",
    "skill": "opening character:0.5 study fail sorrow:0.6 meeting offer:0.7 lesson joy joy:0.3 ending close:0.2",
    "feast": "opening character:0.5 feast journey meeting hunger offer:0.3 share joy joy:0.3 ending close:0.2",
    "noise": "opening character:0.6 noise sorrow:0.6 journey reveal thorn kindness joy ending close:0.2",
}

SHARE_ONCE = 0.6  # of the stories open with "Once upon a time"
