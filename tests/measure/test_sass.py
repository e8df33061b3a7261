"""SASS: listings of both tools, and the loops in them."""

from __future__ import annotations

import dataclasses
from collections import Counter

from fastprefix.measure.kernels import sass
from fastprefix.measure.kernels.gpu_units import GPUS
from fastprefix.measure.kernels.predict import predict_loops
from fastprefix.measure.kernels.sass import Instruction
from fastprefix.measure.kernels.sass_loops import find_loops, source_lines

# As nvdisasm -c -gi prints it: a loop of two tiles' products with a loop inside, a branch around one instruction, and a
# wait at the end of the function that jumps back into the loop.
LISTING = """\
	.target	sm_90a
	.section	.text.attend,"ax",@progbits
attend:
.text.attend:
	//## File "/src/fwd.py", line 9
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
	//## File "/src/fwd.py", line 40 inlined at "/src/fwd.py", line 90
	//## File "/src/fwd.py", line 90
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9+0x18000], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_4) ;
.L_x_5:
	//## File "/src/primitives.py", line 20 inlined at "/src/fwd.py", line 41
	//## File "/src/fwd.py", line 41 inlined at "/src/fwd.py", line 90
	//## File "/src/fwd.py", line 90
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   FMNMX R2, R3, R4, !PT ;
        /*0060*/                   BRA P1, `(.L_x_1) ;
        /*0070*/                   FSEL R2, R2, -INF , P2 ;
.L_x_1:
	//## File "/src/primitives.py", line 31 inlined at "/src/fwd.py", line 43
	//## File "/src/fwd.py", line 43 inlined at "/src/fwd.py", line 90
	//## File "/src/fwd.py", line 90
        /*0080*/                   FFMA R5, R2, R6, -R7 ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
.L_x_2:
        /*00a0*/                   LDSM.16.M88.4 R8, [R9] ;
        /*00b0*/               @P3 BRA `(.L_x_2) ;
        /*00c0*/                   HGMMA.64x64x16.F32.BF16 R88, R8, gdesc[UR8].tnspB, R88, gsb0 ;
        /*00d0*/               @P0 BRA `(.L_x_0) ;
.L_x_3:
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9+0x18000], R24 ;
        /*0100*/              @!P0 BRA `(.L_x_4) ;
        /*0110*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0120*/                   BRA `(.L_x_6);
"""


def test_a_listing_is_read() -> None:
    (function,) = sass.parse(LISTING)
    assert function.name == "attend" and len(function.instructions) == 19 and sass.capability(LISTING) == 90
    branch, product = function.instructions[1], function.instructions[4]
    assert (branch.guarded, branch.target, branch.falls_through) == (True, 0xE0, True)
    assert product.opcode == "HGMMA.64x128x16.F32.BF16" and product.name == "HGMMA"
    assert product.places == (("primitives.py", 20), ("fwd.py", 41), ("fwd.py", 90))
    assert [x.falls_through for x in function.instructions if x.name == "BRA"] == [True] * 6 + [False] * 2


def test_both_tools_give_the_same() -> None:
    """cuobjdump prints addresses in place of labels, each instruction's code, and no lines."""
    address = {}
    for label in range(7):
        at = LISTING.index(f"\n.L_x_{label}:")
        address[f"`(.L_x_{label})"] = "0x" + LISTING[LISTING.index("/*", at) + 2 :][:4].lstrip("0")
    text = "\n".join(line for line in LISTING.splitlines() if not line.startswith(("\t//##", ".L", "\t.section")))
    for label, number in address.items():
        text = text.replace(label, number)
    text = text.replace("attend:", "\t\tFunction : attend", 1).replace(" ;\n", " ;   /* 0x00000a00ff017b82 */\n")
    (one,), (other,) = sass.parse(LISTING), sass.parse(text)
    assert [dataclasses.replace(x, places=(), operands="") for x in one.instructions] == [
        dataclasses.replace(x, operands="") for x in other.instructions
    ]
    assert [x.address for x in find_loops(one)] == [x.address for x in find_loops(other)]


def test_loops_are_found() -> None:
    """The wait at the end of the function belongs to a loop, but not to each of its iterations. Padding is no loop."""
    outer, inner, wait = find_loops(sass.parse(LISTING)[0])
    assert (outer.address, inner.address, wait.address) == (0x20, 0xA0, 0xF0)
    assert Counter(x.name for x in outer.always) == Counter(
        {"BRA": 3, "HGMMA": 2, "SYNCS": 1, "FMNMX": 1, "FFMA": 1, "MUFU": 1}
    )
    assert [x.name for x in outer.sometimes] == ["FSEL", "BRA"]
    assert [x.name for x in inner.always] == ["LDSM", "BRA"] and not inner.sometimes
    assert [loop.place for loop in predict_loops(sass.parse(LISTING)[0], 8, GPUS["h100"])] == [
        "fwd.py:41-43",
        "primitives.py:31",
    ]


def test_lines_of_a_loop() -> None:
    def lines(*chains: list[tuple[str, int]]) -> str:
        return source_lines([Instruction(0, "HMMA.16816", places=tuple(chain)) for chain in chains])

    assert lines() == "" and lines([]) == ""
    assert lines([("a.py", 5)]) == "a.py:5"
    assert lines([("a.py", 5), ("b.py", 9)], [("a.py", 7), ("b.py", 9)]) == "a.py:5-7"
    # Two calls that stand in one line: the line, not those inside them.
    assert lines([("dot.py", 5), ("b.py", 9)], [("a.py", 3), ("a.py", 7), ("b.py", 9)]) == "b.py:9"
