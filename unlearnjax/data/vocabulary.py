"""Words from which the synthetic corpus is written. All people, places and addresses are invented."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((one, other) for one, _, other in (pair.partition(":") for pair in text.split("|")))


SHE_NAMES = _words(
    "Ada Agnes Amara Anneke Beatrix Bryony Carmen Celeste Clara Dagny Delia Edith Elspeth Farah Freya Greta Hanna "
    "Ida Imogen Ines Irma Jolanda Juno Katya Keziah Leonie Liora Mabel Maren Mirela Nadia Nerys Odile Olga Pavla "
    "Petra Rhea Rosalind Runa Saskia Sunniva Tamsin Thora Ulla Verena Wilma Yara Zelda"
)
HE_NAMES = _words(
    "Alaric Anton Arlo Bastian Benedict Bruno Casimir Cedric Corwin Darius Desmond Edmund Elias Emeric Fabian Felix "
    "Gideon Gustav Hamish Harald Hugo Ivo Jasper Joachim Kaspar Kenji Lambert Leopold Linus Magnus Matthias Milan "
    "Nils Orson Oskar Percival Quentin Rafael Roland Rufus Silas Stellan Tobias Ulric Viggo Walter Yannick Zoltan"
)
# A surname is a first part and a second part; every person of a corpus has one of their own.
SURNAME_FIRST = _words(
    "Alder Ash Bar Birch Black Brad Bram Cald Carl Clif Crom Dal Dun East El Fair Fen Gar Glen Green Hal Haw High "
    "Hol Kel Kin Lang Lock Mar Mel Mor New North Oak Pem Quin Rad Red Row Sel Shel Stan Thorn Tren Under Wal Wes "
    "Whit Win Wood"
)
SURNAME_SECOND = _words(
    "bourne brook bury by combe cott dale don field ford gate ham hurst land ley low man mere more shaw son stead "
    "stone ston thorpe ton vale ward well wick win worth"
)

TOWNS = _words(
    "Ambermoor Arnwell Bellhaven Brackwater Caldmere Cinderford Coldharbour Dunmarsh Eastholm Elderbay Fallowmere "
    "Farrowgate Galemouth Goldenrye Harrowmont Hollowquay Ironbridge Juniper Kestrelby Larkspur Lindenfels "
    "Marrowdale Mistleton Nettleton Oakhaven Pinecrest Quarrytown Ravensend Saltmarsh Silverlake Stormhaven "
    "Thistledown Umberlea Velmont Westerly Whitecliff Willowbrook Yarrowfield"
)
STATES = _words("AL AZ CA CO FL GA IA ID IL KS KY MA ME MI MN MO MT NC ND NE NH NM NV NY OH OK OR PA SC TX UT VA VT WA")
STREETS = _words(
    "Acorn Badger Bluebell Bramble Cherry Clover Copper Cypress Falcon Fern Foxglove Garnet Hazel Heather Heron "
    "Ivory Jasmine Lantern Laurel Magnolia Maple Meadow Orchard Osprey Pebble Poplar Primrose Sparrow Spruce "
    "Sycamore Walnut Wren"
)
STREET_KINDS = _words("Street Avenue Lane Road Drive Court Place Way")
MONTHS = _words("January February March April May June July August September October November December")

# Stories.
TRADES = _words(
    "baker beekeeper bookbinder carpenter clockmaker cartographer ferryman fiddler gardener glassblower locksmith "
    "miller painter potter saddler sailmaker tailor weaver"
)
FINDS = _phrases(
    "brass key|cracked mirror|folded map|glass whistle|golden thimble|green lantern|ivory comb|leather diary|"
    "paper boat|porcelain bird|rusted compass|silver bell|stone chess piece|tin soldier|velvet mask|wooden flute"
)
HIDING_PLACES = _phrases(
    "abandoned lighthouse|bell tower|cellar of the inn|dry well|flooded quarry|hollow oak|old railway tunnel|"
    "ruined chapel|salt warehouse|station attic|sunken garden|watermill loft"
)
WEATHER = _phrases(
    "a cold morning in March|a foggy evening|a hot afternoon in July|the first night of frost|"
    "the longest day of summer|a windy autumn day|the last Sunday of winter|a rainy market day"
)
ENDINGS = _phrases(
    "The whole town spoke of it for years.|Neither of them ever told the mayor.|By spring the market had a new sign.|"
    "They opened a small shop together the following year.|The letter was burned that same night.|"
    "Nobody noticed that the clock had stopped.|A week later the harbour froze over.|"
    "Only the stray dog knew the way back.|They agreed to meet again in ten years.|"
    "The secret was safe with the river.|In the end they gave it to the museum.|"
    "The children still tell it differently."
)

# Biographies.
NATIONS = _words(
    "Austrian Belgian Bolivian Canadian Chilean Danish Dutch Estonian Finnish Ghanaian Hungarian Icelandic Irish "
    "Kenyan Latvian Maltese Norwegian Peruvian Polish Scottish Slovak Swedish Turkish Welsh"
)
PROFESSIONS = _phrases(
    "architect|astronomer|botanist|cellist|chess master|composer|cyclist|economist|engraver|fencer|film director|"
    "geologist|historian|judge|linguist|mathematician|novelist|painter|photographer|physician|playwright|rower|"
    "sculptor|surveyor"
)
WORKS = _phrases(
    "the Blue Atlas|the Copper Sonata|the Dune Lectures|the Glass Census|the Granite Prize|the Harbour Plan|"
    "the Iron Garden|the Kestrel Medal|the Lantern Essays|the Moss Catalogue|the Night Bridge|the Orchard Trilogy|"
    "the Paper Theatre|the Quartz Survey|the River Cup|the Salt Symphony|the Silent Map|the Tidal Clock|"
    "the Winter Archive|the Yellow House"
)
SCHOOLS = _phrases(
    "Aldgate College|the Beacon Institute|Carrick University|the Deltan Academy|Ellery College|Foxhall University|"
    "the Granary School|Hartwell University|the Isle Conservatory|Kingsmere College|Lowell Technical School|"
    "the Northern Academy|Ostrava University|Pallas College|the Royal Workshop|Sandhurst Polytechnic"
)
HONOURS = _phrases(
    "a street was named after|the city council honoured|a postage stamp showed|a scholarship was named after|"
    "a small planet was named after|the national museum exhibited"
)

# The neutral world.
COUNTRIES = _words(
    "Avaria Belmaria Corvenia Dorland Esteria Fandoria Grevia Hestonia Istrania Jovaria Kaldovia Lumeria Morvania "
    "Norgard Orsinia Pavonia Quellia Rostovia Sardania Tavaria"
)
CAPITALS = _words(
    "Arkon Bridel Casmir Dravok Elmira Fosta Gandel Hiron Ismar Jelak Korvo Lisket Mandra Nivelle Ostrak Pellas "
    "Querin Rumel Sevran Tolmin"
)
CURRENCIES = _words(
    "anker balin crome dalet ember floret guldar hexal ivor jorin kelt lunar mirel noble orin penta quill rondel "
    "sable talar"
)
ANIMALS = _words(
    "badger bear crane deer eagle falcon fox goat hare heron horse ibis lion lynx otter owl raven stork swan wolf"
)
CROPS = _words(
    "barley beans cherries cotton figs flax garlic grapes hops lemons lentils maize oats olives onions plums rice "
    "rye tea wheat"
)
OPPOSITES = _pairs(
    "hot:cold|tall:short|early:late|full:empty|heavy:light|loud:quiet|open:closed|rich:poor|rough:smooth|sharp:blunt|"
    "strong:weak|sweet:sour|thick:thin|true:false|warm:cool|wet:dry|wide:narrow|young:old|brave:timid|clean:dirty"
)
COLOURS = _pairs(
    "a ripe tomato:red|fresh snow:white|coal:black|a lemon:yellow|the clear sky:blue|a young leaf:green|"
    "a carrot:orange|chocolate:brown|an elephant:grey|a plum:purple|a flamingo:pink|a shiny coin:silver"
)
