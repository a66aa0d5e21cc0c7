"""Common given names of several languages. Those that are words, places or months as well are left out."""

from __future__ import annotations

_NAMES = """
aaron abdul abigail adam adrian adriana agnieszka ahmed aisha albert alejandro alessandro alexander
alexandra alexandre ali alice alicia alison amanda amelia amy ana anastasia andrea andreas andrew andrzej
angela anita ann anna anne annette anthony antoine antonio arthur ashley astrid aurélie barbara beatrice
beatriz ben benjamin bernd betty beverly bjorn björn bob brandon brenda brian bruno camille carl carla
carlos carmen carol caroline catherine cecilia charles charlotte cheryl chiara chloe chris christian
christina christine christophe christopher claire clara claudia colin cynthia dagmar daniel daniela
daniele david deborah denise dennis diana diego dieter dmitri dominik donald donna dorothy douglas edward
eileen elena elizabeth ella ellen emily emma enrique eric erik erika ernst esther ethan eugene eva evelyn
fatima felix fernando florian francesca francesco francisco françois frank franz françoise frederick
friedrich gabriel gabriela gary georg george gerald gerhard giovanni giulia giuseppe gloria gregory
guillaume günter gunther hannah hans harold harry hassan heather heidi heinz helen helena helga helmut
henri henry hugo ian ibrahim ines ingrid irene isabel isabella ivan jack jacob jacqueline jakob james jan
jane janet janice jason javier jean jeff jeffrey jennifer jeremy jerry jessica jesús jim joan joanna joe
johan johann johannes john johnny jonas jonathan jorge jose josé josef joseph joshua juan judith julia
julian julie julien jürgen justin karen karin karl katarzyna katharina katherine kathleen katie keith
kelly kenneth kevin kim klaus krzysztof kyle larissa larry lars laura lauren laurent lea léa leonardo
leon linda lisa lorenzo louis louise luca lucas lucia lucy luis lukas luke magdalena maja manuel manuela
marco marcus margaret margarita maria maría marie marina mario marion marta martha martin martina mary
mateo matteo matthew matthias maximilian megan mehmet melissa michael michaela michel michelle miguel
mohamed mohammed monica monika muhammad nancy natalia natalie nathalie nathan nicholas nicola nicole
nikolai noah olaf oliver olivia olga oscar otto pablo pamela paola patricia patrick paul paula pauline
pedro peter petra philip philipp philippe pierre piotr rachel rafael ralf ralph raymond rebecca renate
ricardo richard robert roberto roger roland ronald rosa roberta ruth ryan sabine samantha samuel sandra
sara sarah scott sebastian sergei sergio sharon silvia simon simone sofia sonja sophia sophie stefan
stefanie stephanie stephen steve steven susan susanne sven svetlana sylvia tanja teresa theodore theresa
thomas tim timothy tobias tom tomasz tyler ulrich ursula ute valentina valerie vanessa vera veronica
victoria vincent virginia vladimir walter wei wendy werner wilhelm william wolfgang xavier yasmin yusuf
yves zoe
"""

GIVEN_NAMES = frozenset(_NAMES.split())
