"""The 1,871 English words that tasks/spelling.py draws from, in alphabetical order."""

WORDS = tuple("""
able about above absent accept accident account achieve across action active actor address adult advice afraid afternoon again against agree
airplane alarm album alive allow almost alone along already also always amazing among amount anchor ancient anger angle animal ankle annual another
answer anybody apart apple apricot april apron arch area argue arithmetic army around arrive arrow article artist aside asleep athlete atom attack
attempt attic august aunt author autumn avenue average avoid awake award away baby bacon badge badger baggage bakery balance balcony ball balloon
bamboo banana bandage banker banner barber bargain barley barn barrel basic basket battery battle beach bead beard beast beautiful beaver because
become bedroom beehive beetle before beggar begin behave behind believe belong below bench benefit berry beside best better between beyond bicycle
billion bird birthday biscuit bitter blanket blaze bless blind blizzard blossom blouse blue board boat body bold bone bonfire bookcase border borrow
bottle bottom bought boulder bounce bowl bracelet brain branch brass brave bread breakfast breath breeze brick bridge brief bright bring broken
bronze brook brother brown brush bubble bucket budget buffalo build bullet bundle burden burger burst business busy butcher butter butterfly button
buyer cabbage cabin cabinet cable cactus calendar calf calm camel camera campus canal cancel candle candy cannon canoe canvas canyon capital captain
caravan carbon career careful carpenter carpet carriage carrot cartoon castle casual catalog catch caterpillar cathedral cattle cause cautious
cavern ceiling celebrate celery cellar cement center century cereal certain chain chair chalk challenge champion chance change channel chapter
character charge charity chase cheap cheese chemical cherry chess chest chicken chief child chimney chocolate choice choose chorus church cinema
circle circus citizen city clarinet class classroom clean clear clever cliff climate climb clinic clock closet cloth cloud clover clown coach coast
cobweb coconut coffee coin cold collar collect college color column comb combine comet comfort comic command committee common company compare
compass complete computer concert concrete condition confess connect consider constant contact contain contest continent continue control cookie
copper copy coral corner correct cottage cotton couch count country couple courage course cousin cover cowboy cradle crane crater crayon cream
creature credit creek cricket crisis crocodile crooked cross crowd crown cruel crumb crystal cube cucumber culture cupboard curious current curtain
curve cushion custom cycle daily dairy daisy damage dance danger daring dark daughter dawn deadline deal debate december decide decimal decorate
deep deer defend degree delay delicate delicious deliver demand dentist depend deposit depth describe desert design desk dessert detail detective
develop device diagram dialogue diamond diary dictionary different difficult digest digital dinner dinosaur direct dirty disagree disappear
disappointed discover discuss disease dish distance distant district divide doctor document dollar dolphin donkey door double doubt dough dozen
dragon drama drawer dream dress drift drink drive drop drum duck dungeon during dust duty dwarf eager eagle early earn earth easel easily east easy
echo eclipse edge editor educate effect effort eight either elbow elder electric elegant element elephant elevator eleven embarrass emerald emotion
employ empty enemy energy engine engineer enjoy enormous enough enter entire envelope equal equator equipment errand error escape essay evening
event every evidence exact example excellent except exchange excite excuse exercise exist expand expect expensive experience experiment expert
explain explode explore express extra eyebrow fabric factory faint fairy faith falcon fall false family famous fancy farmer fashion fasten father
faucet favorite feather feature february federal fence ferry festival fever field fierce fifteen fifty fight figure film final finger finish fire
firefly fireplace first fish flag flame flavor fleet flight float flock flood floor flour flower fluffy flute focus foggy follow foot football
forehead foreign forest forever forget forgive fork form fortune forty forward fossil foundation fountain fourteen fraction fragile frame freedom
freeze freight frequent fresh friday friend frighten frog front frozen fruit fuel funeral funny furniture future galaxy gallery gallon gallop garage
garbage garden garlic garment gasoline gate gather general gentle geography geometry giant gift giraffe girl give glacier glad glass glimpse globe
glory glove glue goal goat goblin golden goose gorilla government grace grade grain grammar grand grandfather grandmother grape graph grass grateful
gravel gravity gray grease great green grocery ground group grow guard guess guest guide guitar gymnasium habit hail half hallway hammer hammock
hamster handkerchief handle handsome hanger happen happiness harbor hardly harmony harvest hatch haunt hawk hazel headache health heart heaven heavy
hedge hedgehog height helicopter helmet helpful herd hero hidden highway history hobby hockey holiday hollow honest honey honor horizon horn horse
hospital hotel hour house hover however huge human humble humor hundred hungry hunter hurricane hurry husband hydrogen idea identify idle igloo
ignore illness imagine imitate immediate impossible improve inch include income increase independent index indoor industry infant inform injury
innocent insect inside inspect instant instead instrument insult interest interrupt invent invisible invite iron island itself ivory jacket jaguar
january jealous jelly jewel jigsaw join joke journal journey judge juggle juice july jump june jungle junior justice kangaroo keeper kennel kettle
keyboard kidney kind kindergarten king kingdom kitchen kitten kneel knife knight knock know knowledge label labor ladder lady lake lamp language
lantern large later laughter laundry lawn lawyer layer lazy leader leaf league learn least leather leave lecture left legend leisure lemon lemonade
length leopard lesson letter lettuce level library license light lightning limit linen lion liquid listen little live lizard llama load loaf lobster
local locket lonely long loose lorry lottery loud lounge lovely lower loyal lucky lumber lunch luxury machine magazine magic magnet maiden mailbox
main major mammal manage mango manner mansion manual marble march margin marine market marriage marsh mask massive master match material mathematics
matter mattress maximum maybe mayor maze meadow meal measure meat mechanic medal medicine medium melody melon melt member memory mention menu
merchant mercury message metal meteor method middle midnight might military million mineral miniature minimum minister minor minute miracle mirror
mischief misery missing mission mississippi mist mistake mitten mixture model modern moment monday money monkey monster month monument moon moose
moral morning mosquito mother motion motor mountain mouse mouth move movie much muddle muffin multiply muscle museum mushroom music mustard mystery
narrow nation native nature naughty navy nearly neat necessary necklace needle neighbor neither nephew nerve nest network never newspaper nickel
niece night nine nineteen nobody noise noodle normal north nothing notice noun novel november nowhere number nurse nutmeg oasis obey object observe
obtain obvious occasion occur ocean october octopus odor offer office often olive omelet once onion only opera operate opinion opposite orange orbit
orchard orchestra order ordinary organ origin ornament orphan ostrich other otter ourselves outdoor outside oval oven owner oxygen oyster package
paddle page paint palace pancake panda panel panic paper parade paragraph parallel parcel pardon parent parking parrot parsley partner party passage
passenger pasta pastry patch path patient pattern pause pavement peace peach peacock peanut pear pebble pelican pencil penguin penny people pepper
percent perfect perform perhaps period permit person pharmacy photograph phrase piano pickle picnic picture piece pigeon pillow pilot pineapple
pioneer pirate pitcher pizza place plain planet plant plastic plate platform play please pleasure plenty pocket poem poet point poison polar police
polite pond pony pool popcorn popular porch portrait position possess possible postcard potato pottery pound powder power practice prairie praise
prefer prepare present president pretend pretty prevent price priest prince princess principal print prison private prize probably problem process
produce professor profit program promise pronounce proof protect proud proverb public pudding pull pumpkin punish pupil puppet puppy purchase pure
purple purpose puzzle pyramid quality quantity quarrel quarter queen question quick quiet quilt quite quiver rabbit raccoon race radio radish
railroad rain rainbow raisin ranch random rapid rare raspberry rather raven razor reach read ready really reason rebel receipt receive recent recipe
recommend record recover rectangle reduce reflect refuse region regular reindeer relative relax release religion remain remember remind remote
remove rent repair repeat replace reply report represent republic rescue reserve respect response rest restaurant result return reveal review reward
rhythm ribbon rice rich riddle ridge right ring ripe river road roast robin robot rocket rodent roof room rooster rope rose rough round route row
royal rubber rude ruin ruler rumor runner rural sacred saddle safety sail salad salmon salt sample sand sandwich satellite satisfy saturday sauce
sausage savage scale scarecrow scarf scatter scene school science scissors score scout scratch scream screen screw sculpture search season seat
second secret secretary section seed seem select senate senior sense sentence separate september sequence serious servant service seven seventeen
several severe shadow shallow shampoo shape share shark sharp sheep shelf shell shelter shepherd shield shine ship shirt shock shoe shoot shop shore
short shoulder shovel shower shrimp shrink shuttle sick sign signal silence silk silly silver similar simple since sincere sing single sister
sixteen size skate skeleton sketch skill skin skirt skunk sleep sleeve sleigh slender slice slide slipper slow small smart smell smile smoke
smooth snack snail snake snow soap soccer social society sock sofa soft soil soldier solid solution somebody something song soon sorry sort soul
sound soup south space spaghetti spare spark sparrow speak special speech speed spell spend sphere spice spider spinach spirit splash splendid split
spoil sponge spoon sport spread spring square squash squeeze squirrel stable stage stair stamp stand star start station statue steady steak steal
steam steel stem step stick stiff still sting stitch stocking stomach stone stool stop storage store storm story stove straight strange straw
strawberry stream street strength stretch strike string stripe strong student study stumble subject submarine subtract suburb succeed success sudden
suffer sugar suggest suitcase summer summit sunday sunflower sunrise sunset supper supply support suppose sure surface surprise surround suspect
swallow swamp swan sweater sweep sweet swift swim switch sword syllable symbol symphony system table tailor talent tank target taste taxi teacher
team tear teaspoon teeth telephone telescope television temper temple tennessee tennis tent terrible territory test thank theater theme themselves
theory thermometer thick thief thirsty thirteen thirty thorn thought thousand thread three throat throne through throw thumb thunder thursday ticket
tide tidy tiger timber time tiny tired tissue title toast tobacco today toddler toe together toilet tomato tomorrow tongue tonight tooth topic torch
tornado tortoise total touch tough tourist towel tower town toy track tractor trade tradition traffic trail train transfer translate transport
travel treasure treat tree tremble triangle tribe trick trip triumph tropical trouble trousers truck trumpet trunk trust truth tuesday tulip tunnel
turkey turn turtle twelve twenty twice twin twist type typical ugly umbrella uncle under understand uniform union unique unit universe university
unknown unless until unusual upper upset upstairs urgent usual vacation vacuum valley valuable vanilla vanish variety various vase vegetable vehicle
velvet verb verse very vessel victory video view village vinegar violet violin virus visible visit vitamin vocabulary voice volcano volleyball
volume volunteer vote vowel voyage wagon waist wait waitress walk wallet walnut wander warm warning warrior wash waste watch water waterfall
watermelon wave weak wealth weapon weather weave wedding wednesday weed week weigh weight welcome west whale wheat wheel where whisper whistle white
whole whose width wild willow window winter wire wisdom wise witch without witness wizard wolf woman wonder wonderful wood woodpecker wool word work
world worm worry worth wreck wrestle wrinkle wrist write wrong yacht yard yawn year yellow yesterday yogurt young yourself youth zebra zero zigzag
zipper zone
""".split())
