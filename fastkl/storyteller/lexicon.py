"""The words of the storyteller's language, by category.

In: nothing. Out: `WORDS[category]`, the words that a slot of that category may hold, and `GENDER[name]`. Every
category is spread over the alphabet on purpose, so that most sentences can be told with words that start alike.
Indefinite articles follow spelling alone ("a" before a consonant letter, "an" before a vowel letter); words that
would break that rule (unicorn, hour) are left out.
"""

from __future__ import annotations

_BOYS = """Adam Alfie Ben Bobby Carl Colin Dan Dexter Eddie Ethan Finn Fred George Gus Harry Hugo Igor Ivan Jack Jim
    Ken Kurt Leo Luke Max Milo Ned Noah Oscar Otto Paul Pete Quentin Quincy Ray Rufus Sam Sid Tim Tom Ulf Victor
    Vince Walter Wilf Yan Yusuf Zack Zeb"""
_GIRLS = """Amy Anna Bella Betty Clara Cora Dora Daisy Ella Emma Fay Fiona Gina Greta Hannah Holly Ida Iris Jane
    Julia Kate Kim Lily Lucy Mia Molly Nell Nora Olga Olive Peg Polly Queenie Rosa Ruth Sally Sue Tess Tina Una
    Ursula Vera Violet Wendy Willa Yara Yvonne Zelda Zoe"""

GENDER: dict[str, str] = dict.fromkeys(_BOYS.split(), "m") | dict.fromkeys(_GIRLS.split(), "f")

_CATEGORIES = {
    # Characters.
    "kind": """ant ape badger bear beaver bunny camel cat crab crow deer dog donkey dragon duck eagle elephant
        ferret fox frog gecko giant giraffe gnome goat hamster hare hedgehog hen horse ibis iguana imp jackal jaguar
        kangaroo kitten koala lamb lion lizard llama mole monkey moose mouse newt octopus otter owl panda parrot
        penguin pig pony puppy quail rabbit raven robin rooster seal snail sparrow spider squirrel swan tiger toad
        turtle urchin vole vulture walrus weasel wolf wombat worm yak zebra""",
    "trait": """active adorable alert anxious bashful bold brave bright busy calm careful cheerful clever clumsy
        curious dainty daring dear dizzy dreamy eager earnest elegant fair faithful fluffy friendly funny furry
        fuzzy gentle giddy good graceful grand grumpy handsome happy helpful hopeful huge humble hungry idle impish
        inventive jaunty jolly jovial joyful jumpy keen kind large lazy little lively lonely lovely loyal lucky
        merry mighty mild modest muddy naughty neat nervous nice nimble noble noisy odd old orderly patient playful
        plump polite proud quick quiet quirky restless rosy round rowdy shy silly sleepy small smart soft spotted
        strong sweet tall tame tender thoughtful tidy timid tiny tired tough ugly unlucky untidy unusual vain
        valiant warm wary weary wee wild wise witty young youthful zany zealous zippy""",
    # Things, food, numbers.
    "thing": """acorn anchor apron arrow ball balloon basket bell blanket book boot bucket button candle cap cart
        clock coat coin crown cup diamond doll drum egg emerald envelope fan feather fiddle flag flower flute
        garland gem gift glove guitar hammer harp hat helmet horn icicle jacket jar jewel jug kettle key kite ladder
        lamp lantern letter locket map marble mask mirror mitten necklace needle net oar orb ornament paddle
        painting pearl pebble pencil pillow puzzle quill quilt rattle ribbon ring robe rope rug saddle scarf shell
        shovel spoon stone sweater tambourine teapot tent toy trumpet umbrella urn vase vest violin wagon wand watch
        wheel whistle xylophone yoke zither""",
    "look": """amber ancient battered beautiful big blue bronze bright cheap colorful copper cracked crooked dainty
        delicate dented dusty elegant empty enormous faded fancy fine flat fragile giant gleaming glittering golden
        gray green handmade handsome heavy hollow icy important indigo ivory jade jagged jingling jolly knitted
        knobby knotted large light little long lost magic marvelous mysterious narrow neat new nice odd old orange
        oval painted patched pink plain polished precious pretty purple quaint rare red round rusty scarlet shiny
        silver simple small smooth soft sparkling splendid striped tangled tattered thick thin tiny ugly unusual
        unbroken valuable velvet violet warm white wide wonderful wooden woolen yellow""",
    "food": """apples apricots beans berries biscuits buns cakes carrots cherries cookies crackers dates doughnuts
        dumplings eggs figs grapes hazelnuts jellies kiwis lemons lollipops melons muffins mushrooms noodles nuts
        olives onions oranges pancakes peaches pears pies plums puddings quinces radishes raisins rolls sandwiches
        scones strawberries tarts tomatoes turnips waffles walnuts yams""",
    "taste": """amazing big brown buttery chewy cold creamy crispy crunchy dainty delicious dry enormous excellent
        fine fluffy fresh fruity golden good green hot huge icy juicy jumbo large lovely lumpy mashed mild moist
        nice nutty odd orange perfect pink plump purple quaint red rich ripe round salty sour spicy sticky sugary
        sweet tasty tender tiny toasted ugly unusual warm wonderful yellow yummy zesty""",
    "number": "two three four five six seven eight nine ten eleven twelve twenty forty sixty ninety several many",
    # Places, times.
    "place": """abbey alley attic barn bay beach bridge castle cave cottage den desert dock field forest fountain
        garden glade grove harbor hill house hut inn island jungle kitchen lake lane library lighthouse market
        meadow mill mountain nest oasis orchard palace park path pond quarry quay river road ruin school shop shore
        stable stream temple tower town tunnel valley village volcano waterfall well windmill wood yard zoo""",
    "scene": """airy ancient beautiful bright busy calm cold cozy cool crowded dark deep distant dusty empty
        enchanted endless faraway foggy forgotten frosty gloomy golden grand grassy green hidden high humble icy
        idle jolly kindly leafy little lonely lovely magic misty mossy muddy mysterious narrow nearby noisy odd old
        open peaceful pleasant pretty quaint quiet rainy remote rocky royal rusty sandy secret shady silent sleepy
        snowy sunny tidy tiny tranquil ugly unknown untidy vast warm wide wild windy wonderful yellow""",
    "near": "around behind beside beyond by near outside past",
    "weather": """autumn awful beautiful blue breezy bright calm chilly clear cloudy cold cool damp dark dewy dull
        early fine foggy fresh frosty golden gray hazy hot icy lazy lovely mild misty moonlit nippy ordinary
        pleasant quiet rainy rosy snowy spring starry stormy summer sunny tranquil unusual warm wet wild windy
        winter""",
    "time": "afternoon day evening morning night weekend",
    # Deeds, in the past tense.
    "go": """ambled bounced bounded crawled crept danced darted dashed drifted edged floated galloped glided hiked
        hobbled hopped hurried inched jogged journeyed leaped limped marched moved nipped paced plodded pranced
        raced rambled ran rolled rushed sailed scampered shuffled skipped slid sneaked sped strolled tiptoed toddled
        traveled trotted trudged tumbled ventured waddled walked wandered went wobbled zigzagged zoomed""",
    "find": "beheld detected discovered found glimpsed noticed observed saw spied spotted uncovered viewed",
    "handle": """admired balanced brushed carried cleaned dusted examined fetched grabbed held hugged inspected
        juggled kept kissed licked lifted loved nudged owned painted patted polished pulled raised rubbed shook
        squeezed studied tapped touched treasured tugged unwrapped used valued washed watched wiped yanked""",
    "spoil": """bent broke bumped cracked crushed damaged dented dropped forgot kicked lost mislaid misplaced ruined
        scratched smashed snapped spoiled stained tossed wrecked""",
    "cheer": """applauded beamed bowed cheered chuckled clapped danced giggled grinned hopped hummed jumped laughed
        nodded pranced rejoiced sang smiled twirled waved whistled wiggled winked yodeled""",
    "weep": """blinked cried fretted frowned gasped groaned howled moaned mumbled panicked pouted quaked quivered
        shivered sighed sniffed sobbed sulked trembled wailed wept whimpered worried yelped""",
    "say": """agreed announced answered begged bellowed called chirped cried declared exclaimed gasped giggled
        howled insisted joked laughed mumbled murmured offered piped promised quipped remarked replied said sang
        shouted squeaked teased urged uttered vowed whispered yelled""",
    # Deeds, in the base form.
    "want": """admire borrow buy discover draw enjoy fetch find get have hold inspect juggle keep obtain own paint
        see take touch use visit win""",
    "mend": """clean fetch find fix glue hunt mend paint patch polish rebuild repair rescue restore save sew
        straighten tidy unpack wash""",
    "skill": """bake climb cook count dance dive draw drum fish fly garden giggle hop juggle jump knit leap march
        mime paint race read ride row sail sew sing skate ski skip spin swim tango tumble twirl walk whistle write
        yodel zigzag""",
    # Manner and mood.
    "manner": """amazingly anxiously boldly bravely brightly briskly busily calmly carefully cheerfully clumsily
        curiously daintily dreamily eagerly easily excitedly faithfully gently gladly gracefully gratefully happily
        hastily helpfully hopefully idly impatiently instantly jauntily jovially joyfully keenly kindly lazily
        lightly loudly lovingly merrily mildly modestly neatly nervously nicely nimbly noisily oddly openly
        patiently playfully politely promptly proudly quickly quietly rapidly readily restlessly sadly safely shyly
        silently sleepily slowly softly suddenly sweetly swiftly tenderly thoughtfully tidily timidly truly urgently
        valiantly vigorously warily warmly wearily wildly wisely zealously""",
    "glad": """amazed amused blissful calm cheerful content delighted elated excited fortunate glad grateful happy
        hopeful inspired jolly joyful jubilant lucky merry overjoyed peaceful pleased proud quiet relieved satisfied
        thankful thrilled tickled upbeat warm zestful""",
    "sad": """afraid alarmed angry anxious ashamed blue bothered confused cross dismayed downcast embarrassed
        frightened furious gloomy glum grumpy helpless homesick hopeless hurt irritated jealous jittery lonely lost
        miserable nervous puzzled queasy restless sad scared shaken sorry sulky tearful tense terrified troubled
        uneasy unhappy upset vexed weary worried""",
}

WORDS: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _CATEGORIES.items()}
