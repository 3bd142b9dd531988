r"""Which references are read, as what, and which are refused: no wrong answer is paid, every right one is.

A completion answers in `\boxed{…}`, and every answer below stands in one.
"""

import math

import pytest

from cfpo_trl.rewards import accuracy_reward
from cfpo_trl.rewards.golds import UnreadableGold, read_gold

MATRIX = "\\begin{pmatrix}0 & 3 \\\\ 0 & -1\\end{pmatrix}"
GSM8K = "She has 3 + 4 = <<3+4=7>>7 apples.\nThat is $7 in all.\n#### "
MATH = r"Since $x<2$, $|x-2|=2-x$. If $2-x=p$, then $x=2-p$. Thus $x-p=\boxed{2-2p}$."

READ = [  # reference, right answers, wrong answers
    # Integers
    ("42", ["42", "42.0", r"\frac{84}{2}", "x=42"], ["43", "4", "2", "420", r"42\%+1"]),
    ("-7", ["-7", "-7.0", r"-\frac{14}{2}"], ["7", "-8", "0"]),
    ("+5", ["5", "+5"], ["-5", "6", "0"]),
    ("0", ["0", "0.0", "-0"], ["1", "1 000 000", "5 0", "0.0000001", "10"]),
    (17, ["17"], ["71", "1.7"]),
    ("007", ["7", "007"], ["70"]),
    ("5.", ["5"], ["6"]),
    (10**18, ["1000000000000000000", "10^{18}"], ["10^{17}", "1000000000000000001"]),
    # Decimals
    ("-.5", ["-0.5", r"-\frac{1}{2}", "-.5"], ["0.5", "-5", ".5"]),
    (".25", ["0.25", r"\frac14"], ["25", "2.5"]),
    ("12.50", ["12.5", "12.50", r"\frac{25}{2}"], ["12.05", "125", "12"]),
    (0.1, ["0.1", r"\frac{1}{10}"], ["0.2", "1"]),
    (5.0, ["5", "5.0"], ["50", "0.5"]),
    (1e-05, ["0.00001", "10^{-5}", r"1 \times 10^{-5}"], ["-5", "0", "0.0001", "e-5", "0.000011", "5"]),
    ("3{,}14", ["3.14"], ["3", "14", "314", "3, 14"]),
    # Thousands
    ("1,234", ["1234", "1,234", "1{,}234", r"1\,234", "1 234"], ["1", "234", "1.234", r"\{1, 234\}"]),
    ("1,000,000", ["1000000", "1,000,000", "10^6", "1 000 000"], ["1000", "0", "1", "1000,000,1"]),
    ("1 000 000", ["1000000", "1,000,000", r"1\,000\,000"], ["0", "1", "1000"]),
    ("12 345", ["12345", "12,345"], ["357", "12", "345", r"12 + 345"]),
    ("1{,}000", ["1000", "1,000"], ["1", "0", "1.0"]),
    (r"1\,000", ["1000"], ["1", "0"]),
    (r"10,\!000", ["10000", r"10,\!000"], ["10", "0"]),
    ("250,000", ["250000", "250,000"], ["250", "0"]),
    ("-1,234.5", ["-1234.5", "-1,234.5"], ["1234.5", "-1", "-1.2345"]),
    ("1,000 and 2,000", ["1000, 2000", r"\{1000, 2000\}"], ["1000", "2000", "1, 0, 2, 0"]),
    (r"1152\pi", [r"1,152\pi", r"1{,}152\pi", r"1\,152\pi"], [r"152\pi", "1, 152", "1152"]),
    ("1152/5", [r"\frac{1,152}{5}", r"\frac{1152}{5}", "230.4"], [r"\frac{152}{5}"]),
    # Lists
    ("4,6,14,15", ["4,6,14,15", r"\{4, 6, 14, 15\}", "4, 6, 14, 15"], ["4.6", "4,6,14", "15", "4", "4,6,14,16"]),
    ("-2,1", ["-2,1", "-2, 1", "1, -2"], ["-2.1", "-2", "1", "2,1"]),
    ("1,-2", ["1,-2", r"1 \text{ and } -2"], ["1", "-2", "1,2"]),
    ("3, 5, 7", ["3,5,7", r"\{3,5,7\}"], ["3.5", "7", "3, 5", "357"]),
    ("2007 and 2008", ["2007, 2008", r"2007 \text{ and } 2008"], ["2008", "2007", "4015"]),
    ("3, 4, and 5", ["3, 4, 5"], ["3", "5", "12"]),
    ("5 or -5", ["5, -5", r"\pm 5"], ["5", "-5", "0"]),
    (r"6 \text{ and } 8", ["6, 8"], ["6", "8", "48", "14"]),
    (r"$\frac{1}{2}$ and $\frac{1}{3}$", [r"\frac{1}{2}, \frac{1}{3}"], [r"\frac{1}{2}", r"\frac{1}{3}"]),
    ("7; 9", ["7, 9"], ["7", "9", "7.9"]),
    (["3", "5"], ["3, 5"], ["3", "5", "8", "35"]),
    (["3"], ["3"], ["5"]),
    (r"\pm 3", [r"\pm 3", "3, -3"], ["3", "-3"]),
    ("A, C", ["A, C", r"\text{A}, \text{C}", "A,C"], ["A", "C", "A, B"]),
    # Sets, tuples, intervals
    ("{1,2,3}", [r"\{1,2,3\}", "1,2,3"], [r"\{1,2\}", "3", "123"]),
    (r"\{1,2\}", [r"\{2,1\}", r"\{1, 2\}"], [r"\{1,3\}", "1"]),
    ("(1,2)", ["(1,2)", "(1, 2)"], ["(2,1)", "1.2", "[1,2]", "3"]),
    ("(1,234)", ["(1,234)", "(1, 234)"], ["1234", "(1,23)"]),
    ("(1, 1, 2)", ["(1,1,2)"], ["(1,2)", "(1,2,1)"]),
    ("(1, 2), (3, 4)", ["(1,2),(3,4)", r"\{(1,2), (3,4)\}"], ["(1,2)", "(3,4)", "(2,1),(4,3)"]),
    ("(0;0;0),(4;-2;6)", ["(0,0,0),(4,-2,6)"], ["(0,0,0)", "(4,-2,6)"]),
    ("[0,1)", ["[0,1)", "[0, 1)", r"0 \le x < 1"], ["(0,1)", "[0,1]", "0.1", "[0,2)"]),
    ("[100,200]", ["[100,200]", "[100, 200]"], ["100200", "(100,200)", "[100,300]"]),
    ("(-∞, 3]", [r"(-\infty, 3]"], [r"(-\infty, 3)", "3"]),
    (r"(-\infty, 3] \cup [5, \infty)", [r"(-\infty,3]\cup[5,\infty)"], [r"(-\infty,3]", r"[5,\infty)"]),
    (r"\mathbb{R} \setminus \{0\}", [r"\mathbb{R} \setminus \{0\}"], [r"\mathbb{R}", "0"]),
    ("∅", [r"\emptyset"], ["0", r"\{0\}"]),
    # Boxes and worked solutions
    (r"\boxed{3} and \boxed{4}", ["3, 4", r"\{3,4\}"], ["3", "4", "7", "34"]),
    (r"$\boxed{1}\boxed{2}$", ["1, 2"], ["1", "2", "12"]),
    (r"\(\boxed{1}\) and \(\boxed{-2}\).", ["-2, 1"], ["-2", "1"]),
    (f"\\boxed{{\n{MATRIX}\n}}.\n\\end{{align*}}", [MATRIX], ["-1", "3", MATRIX.replace("3", "4")]),
    (r"So \boxed{5}. Check: \boxed{5} is right.", ["5"], ["6"]),
    (r"The loss is $\boxed{28}\%$.", [r"28\%", "28"], ["72", "2.8"]),
    (MATH, ["2-2p", "2(1-p)"], ["2", "2p", "2-p"]),
    (r"Thus \boxed{\frac{1}{2}}.", ["0.5", r"\frac12"], ["1", "2", "12"]),
    (r"we get $\boxed{14{,}916}$.", ["14916", "14,916"], ["14", "916"]),
    (r"\boxed{\text{Evelyn}} is our answer.", ["Evelyn", r"\text{Evelyn}"], ["Carla", "Eve"]),
    ("\\boxed{5}.\n#### Verification\n2 + 4 = 6, so no.", ["5"], ["6", "2"]),
    ("\\boxed{5}.\n#### Verification: 2 + 4 = 6", ["5"], ["6"]),
    ("So it is \\boxed{7}.\n#### 7", ["7"], ["5"]),
    (GSM8K + "7", ["7"], ["3", "4"]),
    (GSM8K + "153,370", ["153370"], ["153", "370"]),
    (GSM8K + "$1,200", ["1200", r"\$1200"], ["1", "200", "12"]),
    (GSM8K + "-3.50", ["-3.5"], ["3.5"]),
    ("The answer is $5$.", ["5"], ["6"]),
    ("Answer: 12", ["12"], ["1", "2"]),
    # Matrices
    (MATRIX, [MATRIX, MATRIX.replace("pmatrix", "bmatrix")], [MATRIX.replace("-1", "1"), "-1", "0"]),
    (r"\left[\begin{array}{cc}1 & 2 \\ 3 & 4\end{array}\right]", [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"], ["4"]),
    # Fractions
    ("3/4", [r"\frac{3}{4}", "0.75", "3/4"], ["4/3", "3", "4", "34"]),
    ("-3/4", [r"-\frac{3}{4}", r"\frac{-3}{4}"], ["3/4", "-3"]),
    (r"\frac12", [r"\frac{1}{2}", "0.5"], ["12", "1", "2"]),
    (r"\dfrac{10}{4}", ["2.5", r"\frac52"], ["10", "4"]),
    ("1 1/2", [r"\frac{3}{2}", r"1\frac{1}{2}", "1.5"], ["1", "1/2", "11/2", "1 1"]),
    ("2½", ["2.5", r"2\frac{1}{2}"], ["2", "1", "21/2"]),
    (r"1\frac{3}{4}", ["1.75", r"\frac{7}{4}"], ["3/4", "1"]),
    ("3:2", ["3:2", r"\frac{3}{2}"], ["2:3", "3", "2"]),
    # Radicals
    (r"3\sqrt{5}", [r"3\sqrt{5}", r"\sqrt{45}", r"3\sqrt5"], ["3", "5", "15", r"\sqrt{5}"]),
    ("3*sqrt(5)", [r"3\sqrt{5}", r"\sqrt{45}"], ["3", "5", r"5\sqrt{3}"]),
    ("4√3", [r"4\sqrt{3}"], ["4", "3", "43", "12"]),
    ("√(2+√3)", [r"\sqrt{2+\sqrt{3}}"], [r"\sqrt{2}+\sqrt{3}", "2"]),
    ("∛8", ["2", r"\sqrt[3]{8}"], ["8", r"\sqrt{8}"]),
    ("(1+sqrt(5))/2", [r"\frac{1+\sqrt{5}}{2}"], ["1", "2", r"\frac{1-\sqrt{5}}{2}"]),
    ("sqrt3/2", [r"\frac{\sqrt{3}}{2}"], ["3/2", r"\sqrt{3}"]),
    (r"\sqrt 2+\sqrt 5", [r"\sqrt{2}+\sqrt{5}"], [r"\sqrt{7}", "7"]),
    # Powers and scientific notation
    ("2²", ["4", "2^2"], ["2", "22"]),
    ("10⁶", ["10^6", "1000000", "1,000,000"], ["10", "106", "60"]),
    ("2^10", ["1024", "2^{10}"], ["2", "20", "10"]),
    ("10^-3", ["0.001", "10^{-3}"], ["10", "-3", "7"]),
    ("x**2 + 1", ["x^2+1"], ["x+1", "1", "2x+1"]),
    ("1e-05", ["0.00001", "10^{-5}"], ["0", "1", "-5", "e-5"]),
    ("1.5e3", ["1500", r"1.5\times 10^3"], ["1.5", "3", "15"]),
    ("6.02 x 10^23", [r"6.02\times 10^{23}"], ["6.02", "23", r"6.02\times 10^{22}"]),
    ("2×10⁶", ["2000000"], ["2", "20", "26"]),
    (r"\frac{1}{2^{99}}", [r"\frac{1}{2^{99}}", "2^{-99}"], [r"\frac{1}{2^{98}}", "0"]),
    # Money
    (r"\$18.90", ["18.90", r"\$18.90", "18.9", r"18.90\text{ dollars}"], ["18", "90", "1890"]),
    ("$18.90", ["18.90", r"\$18.90"], ["18", "1.89"]),
    ("$5", ["5", r"\$5"], ["6"]),
    ("€20", ["20", "€20", "20€"], ["2", r"\$20\text{ dollars}"]),
    ("-$5", ["-5", r"-\$5"], ["5"]),
    ("$1,234.50", ["1234.5", r"\$1,234.50"], ["1", "234.5"]),
    ("18 dollars", ["18", r"\$18", r"18\text{ dollars}"], ["81", r"18\text{ cents}"]),
    ("$5 and $6", ["5, 6"], ["5", "6", "11"]),
    # Units and angles
    ("5 cm", ["5", r"5\text{ cm}", "5 cm", r"5\,\mathrm{cm}", r"5\text{ centimeters}"], ["6", r"5\text{ m}", "50"]),
    (r"10\text{ cm}^2", ["10", r"10\text{ cm}^2", r"10\text{ square centimeters}"], ["100", "20"]),
    ("20 mph", ["20", r"20\text{ miles per hour}"], ["2", r"20\text{ km/h}"]),
    (r"3\sqrt{2}\text{ inches}", [r"3\sqrt{2}", r"3\sqrt2 \text{ in}"], ["3", "2"]),
    ("6 hours", ["6", r"6\text{ hours}", r"6\text{ h}"], ["60", r"6\text{ minutes}"]),
    (r"25\pi\text{ square units}", [r"25\pi"], ["25", r"\pi"]),
    ("90°", ["90", r"90^\circ", r"90\text{ degrees}"], ["9", "180"]),
    (r"45^{\circ}", ["45"], ["54"]),
    ("5!", ["120", "5!"], ["5", "24"]),
    ("12", [r"12\text{ apples}", r"12\,\text{cm}"], [r"12\text{ million}", "12x", "12t", r"12 \text{ dozen}"]),
    # Percentages
    ("50%", [r"50\%", "0.5", "50"], ["5", "0.05", "500", "5\\%"]),
    (r"12.5\%", [r"12.5\%", "0.125"], ["125", "1.25"]),
    ("50 percent", [r"50\%"], ["5", r"5\%"]),
    # Bases
    ("204_5", ["204_5", "204_{5}"], ["204_6", "203_5", "54"]),
    # Expressions, equations, inequalities
    ("2x+3", ["3+2x", "2x+3"], ["2x", "3", "2x-3", "5"]),
    ("2*x+3", ["2x+3"], ["2", "3", "x+3"]),
    ("2abc", ["2abc", "2cba"], ["2", "abc", "2ab"]),
    ("20t", ["20t"], ["20", "t", "2t"]),
    (r"\frac{1}{2}gt", [r"\frac{gt}{2}"], [r"\frac{1}{2}", r"\frac{1}{2}g"]),
    ("n(n+1)/2", [r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"], ["n", r"\frac{n}{2}"]),
    ("x=5", ["5", "x=5"], ["y=5", "x=6", "x"]),
    ("x = 1 or x = 2", ["1, 2", "x=1, x=2", "x=1,2"], ["1", "2", "3"]),
    ("x=1, y=2", ["x=1, y=2", "(1, 2)", "y=2, x=1", "(x,y)=(1,2)"], ["(2,1)", "x=2, y=1", "2, 1", "1"]),
    ("x_1 = 3, x_2 = 4", ["3, 4", "4, 3", "x_1 = 3, x_2 = 4"], ["3", "4"]),
    ("p=5,q=2;p=7,q=2", ["(5,2),(7,2)"], ["(2,5),(2,7)", "(5,2)"]),
    ("y = mx + b", ["y=mx+b"], ["y=mx", "y=bx+m"]),
    ("f(x)=x^2", ["x^2", "f(x)=x^2"], ["x", "2"]),
    ("x > 3", ["x>3", "3<x", r"(3,\infty)"], ["x<3", r"x \ge 3", "3"]),
    ("1 < x < 3", ["1<x<3", "(1,3)"], ["1<x<4", "[1,3]"]),
    ("x ≥ 3", [r"x \ge 3", r"[3,\infty)"], ["x>3", "3"]),
    (r"\\frac{3}{7}", [r"\frac{3}{7}"], ["3", "7"]),
    ("sin(x)", [r"\sin x", r"\sin(x)"], ["x", r"\cos x"]),
    (r"\log_2 8", ["3", r"\log_2 8"], ["8", "2"]),
    ("2π", [r"2\pi"], ["2", "6.28"]),
    ("pi/4", [r"\frac{\pi}{4}"], ["4", r"\pi"]),
    ("e^(2x)", ["e^{2x}"], ["e^2x", "2x"]),
    ("3+4i", ["3+4i", "4i+3"], ["3-4i", "7"]),
    (r"1 - \frac{1}{\mathrm{e}}", [r"1-\frac{1}{e}", r"1 - \frac{1}{\mathrm{e}}"], ["1", r"1+\frac{1}{e}"]),
    ("1", ["1"], [r"1 - \frac{1}{\mathrm{e}}", "1 1/2"]),
    ("infinity", [r"\infty"], [r"-\infty", "0"]),
    (r"\pi(R^2-r^2)", [r"\pi(R^2-r^2)", r"\pi(R-r)(R+r)"], ["0", r"\pi(r^2-R^2)"]),
    ("A/a", [r"\frac{A}{a}"], ["1", r"\frac{a}{A}"]),
    ("1/2*x", [r"\frac{x}{2}", r"\frac{1}{2}x"], [r"\frac{1}{2x}"]),
    ("2(3)", ["6", "2(3)"], ["5", "23"]),
    ("12", ["(3)(4)", "3(4)"], ["7", "34"]),
    ("4(3)^{n-1}", [r"4 \cdot 3^{n-1}"], ["12^{n-1}", "7^{n-1}"]),
    # Equations without a real solution are different equations, and a value is no equation of two unknowns
    ("x^2 - 4x + 5 = 0", ["x^2-4x+5=0", "2x^2-8x+10=0", "x^2-4x=-5"], ["x^2+9=0", "x^2-4x+6=0", "0"]),
    (r"\sin x = 2", [r"\sin x = 2"], [r"\sin x = 3", "2"]),
    ("x^2+y^2+1=0", ["x^2+y^2+1=0"], ["x^2+y^2+2=0"]),
    ("x + y = 5", ["x+y=5", "y=5-x"], ["5", "x-y=5"]),
    ("xy=12", ["xy=12"], ["12"]),
    ("AB = 5", ["5", "AB=5"], ["6"]),
    (r"|x| = 3", [r"|x| = 3"], ["3"]),
    # The end points of an interval are not the interval
    ("1, 3", ["1, 3", r"x=1 \text{ or } x=3"], ["1<x<3"]),
    ("2 < x < 4", ["2<x<4", "(2,4)"], [r"x=2 \text{ or } x=4", "2, 4"]),
    # Differences that are small beside 1
    (r"1-\frac{1}{2^{99}}", ["1-2^{-99}"], [r"1-\frac{1}{2^{100}}", r"1+\frac{1}{2^{99}}", "1"]),
    (r"1-(5/6)^{200}", [r"1-\left(\frac{5}{6}\right)^{200}"], [r"1-\left(\frac{5}{6}\right)^{201}"]),
    ("1/3", ["0.333333", "0.33333333"], ["0.3333", "0.333", "0.3"]),
    # Currencies, and text that is no unit
    ("50 cents", ["50", r"50\text{ cents}"], [r"\$50", "€50"]),
    (r"\$5", [r"\$5", "5", "5 dollars"], ["€5", r"5\text{ cents}"]),
    ("5 yuan", ["5", "¥5"], ["6", r"\$5"]),
    (
        "5",
        [r"5\text{ apples}", r"\boldsymbol{5}", "5."],
        [r"5\text{pi}", r"5\text{ x}", r"5\text{M}", r"5\text{ lakh}"],
    ),
    ("90", ["90°", r"90^\circ"], ["9°"]),
    # A thin space behind a comma
    (r"[50,\,100]", ["[50,100]", r"[50,\,100]"], ["50100", "(50,100)"]),
    ("(10,100)", [r"(10,\,100)"], ["10100"]),
    # Exact numbers of any size
    ("2^{2021}", ["2^{2021}", r"2 \cdot 2^{2020}"], ["2^{2020}", "2021^2"]),
    ("2016!", ["2016!"], ["2015!"]),
    (r"\binom{2020}{1010}", [r"\binom{2020}{1010}"], [r"\binom{2020}{1011}"]),
    (r"1-\frac{1}{2021!}", [r"1-\frac{1}{2021!}"], [r"1-\frac{1}{2020!}", "1"]),
    (r"1-\frac{1}{2^{2020}}", ["1-2^{-2020}"], [r"1-\frac{1}{2^{2019}}", r"1+\frac{1}{2^{2020}}"]),
    ("(1/2, 1/2^{300})", [r"(\frac12, 2^{-300})"], [r"(\frac12, 2^{-301})"]),
    (r"\sqrt{0.3}", [r"\frac{\sqrt{30}}{10}", r"\sqrt{\frac{3}{10}}"], [r"\sqrt{3}"]),
    ("100(1.05)^n", [r"100\left(\frac{21}{20}\right)^n"], ["105^n"]),
    # Products written with spaces, functions with brackets
    ("2 n", ["2n", "2 n"], ["2", "n"]),
    ("a_{n}=2 n", ["2n", "a_n=2n"], ["2"]),
    (r"V=\frac{1}{3} S h", [r"\frac{Sh}{3}"], [r"\frac{S}{3}", r"\frac13"]),
    ("n 2^{n-1}", ["n2^{n-1}", r"n \cdot 2^{n-1}"], ["2^{n-1}", "2n^{n-1}"]),
    (r"\frac n2", [r"\frac{n}{2}"], [r"\frac{2}{n}", "n2"]),
    (r"\log_2(3)", [r"\log_2 3", r"\log_2(3)"], [r"3\log 2", "3"]),
    ("3", [r"\log_2(8)", r"\log_2 8"], [r"\log_2 4"]),
    (r"20 \mathrm{~cm}", ["20", r"20\mathrm{~cm}"], [r"20\mathrm{~m}", "2"]),
    ("20", [r"20\mathrm{~cm}", r"20~\mathrm{cm}"], [r"20\text{ lakh}"]),
    # Complex numbers, both signs, angles
    ("2 + 3 i", ["2+3i", "3i+2"], ["2-3i", "5"]),
    (r"\frac{3}{5}+\frac{4}{5}i", [r"\frac{3+4i}{5}"], [r"\frac{3-4i}{5}"]),
    (r"2+3\mathrm{i}", ["2+3i"], ["2-3i"]),
    (
        r"\frac{-1\pm\sqrt{5}}{2}",
        [r"\frac{-1\pm\sqrt{5}}{2}", r"\frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2}"],
        [r"\frac{-1+\sqrt{5}}{2}", r"\frac{1\pm\sqrt{5}}{2}"],
    ),
    (r"\tan 15^\circ", [r"2-\sqrt{3}", r"\tan(15^\circ)"], [r"\tan 15"]),
    (r"\frac12", [r"\sin 30^\circ", r"\sin{30^{\circ}}"], [r"\sin 30"]),
    # Values with a name
    ("a:b=2:3", ["2:3"], ["3:2"]),
    ("x_1+x_2=3", ["3"], ["2"]),
    ("f(2)=5", ["5", "f(2)=5"], ["2", "6"]),
    (r"\theta=\frac{\pi}{6}", [r"\frac{\pi}{6}"], ["6"]),
    (r"y=\sin^4 x+\cos^4 x", [r"y=1-\frac12\sin^2 2x"], [r"y=1+\frac12\sin^2 2x"]),
    (r"(2,120^\circ)", [r"(2,120^\circ)"], ["2120"]),
    (r"(1,100\pi)", [r"(1,100\pi)"], [r"1100\pi"]),
    (r"\text{None}", [r"\text{None}"], ["0"]),
    # Boxes that only seem to hold a part
    (r"**Answer:** $\boxed{5}$", ["5"], ["6"]),
    (r"<answer>$\boxed{5}$</answer>", ["5"], ["6"]),
    ("**Final Answer**\n\\[\n\\boxed{5}\n\\]\n\n- Check: 5 = 2 + 3", ["5"], ["2", "3"]),
    (r"\boxed{90}^\circ", ["90"], ["9"]),
    (r"<answer>\boxed{5}</answer>", ["5"], ["6"]),
    (r"(\boxed{B})", ["B", "b"], ["C"]),
    (r"So $x \in \boxed{[0,1]}$.", ["[0,1]"], ["(0,1)"]),
    ("In 2008\n\\boxed{5} were there, as \\boxed{5} shows.", ["5"], ["2008", "20085"]),
    # Multiple choice
    ("B", ["B", r"\text{B}", "(B)", r"\textbf{(B)}"], ["A", "C", "8"]),
    ("(B)", ["B", r"\text{(B)}"], ["A", "D"]),
    (r"\textbf{(C)}", ["C", "(C)"], ["D"]),
    ("D.", ["D"], ["A"]),
    # Words
    ("Evelyn", ["Evelyn", r"\text{Evelyn}", r"\text{evelyn}"], ["Carla", r"\text{Evely}"]),
    ("yes", [r"\text{yes}", r"\text{Yes}"], [r"\text{no}"]),
    ("ellipse", [r"\text{ellipse}"], [r"\text{circle}"]),
    ("cat", [r"\text{cat}", "cat"], ["act", r"\text{act}"]),
    (r"\text{no solution}", [r"\text{no solution}", r"\text{No solution}"], ["0", r"\text{one solution}"]),
    (True, [r"\text{True}"], [r"\text{False}"]),
]

REFUSED = [  # reference, reason
    ("153,370", "one number, or several"),
    ("100 200 300", "one number, or several"),
    (r"\boxed{153,370,371,407}", "one number, or several"),
    ("1,234,5", "thousands, or several numbers"),
    ("x=1,234", "thousands, or several numbers"),
    ("[1,000, 2,000]", "thousands, or several numbers"),
    ("0,333", "thousands, or several numbers"),
    ("3,14", "a decimal comma, or two numbers"),
    ("0,5", "a decimal comma, or two numbers"),
    ("3,05,7", "a decimal comma, or several numbers"),
    ("1.000.000", "points between thousands"),
    ("1,1,2", "one member twice"),
    ("3,,4", "nothing between two commas"),
    ("1,5;2,5", "lists of lists"),
    ("1, 2, \\ldots", "an ellipsis"),
    ("1, 2, ...", "an ellipsis"),
    ("2 hours 30 minutes", "variables or units"),
    ("5 feet, 6 inches", "a list with units"),
    ("3 ft 2 in", "variables or units"),
    ("98.6 F", "a unit, or a variable"),
    (r"25^\circ\text{C}", "a unit, or a variable"),
    ("2x cm", "the text 'cm'"),
    ("5 apples", "the text 'apples'"),
    (r"12\text{ apples}", "text in a formula"),
    ("5 million", "the text 'million'"),
    ("twelve", "a number in words"),
    ("twelve apples", "the text 'twelve'"),
    ("half", "a number in words"),
    ("1st", "an ordinal"),
    (r"10\text{th}", "text in a formula"),
    ("2021-05-05", "a date, a range or a difference"),
    ("5/12/2020", "a date"),
    ("May 5, 2021", "the text 'May'"),
    ("5.12.2020", "a date"),
    ("3-5", "a range"),
    ("1-1/2", "a mixed number"),
    ("12:30", "a time"),
    ("12:30 PM", "a time"),
    ("1:2:3", "a ratio of three"),
    ("(D) 7", "a choice and its text"),
    ("C. 5", "a choice and its text"),
    (r"\textbf{(C)}\ 12", "text in a formula"),
    ("ACD", "several choices, or points"),
    ("AB", "several choices, or points"),
    (r"\angle ABC", r"\angle"),
    ("no solution", "the text 'no'"),
    ("All real numbers greater than 3.", "the text 'All'"),
    ("The answer follows from the lemma above.", "the text 'The'"),
    ("nan", "no answer"),
    ("null", "no answer"),
    (r"0.\overline{3}", "a repeating decimal"),
    ("x'", "a prime"),
    ("['3', '5']", "a prime, or a quotation"),
    ({"value": 3}, "a dict"),
    ("x < 3 or x > 5", "several inequalities"),
    ("x=1, 2, y=3", "several unknowns"),
    (r"2\frac{3}{2}", "a mixed number, or a product"),
    (r"\sqrt12", "digits behind a command"),
    ("1+1=2", "a calculation"),
    (r"5 \approx 5.1", r"\approx"),
    (r"101_2 + 1", "another base"),
    (r"x \equiv 3 \pmod{7}", r"\equiv"),
    ("$$", "the sign $"),
    ("5–7", "the sign –"),
    (r"\boxed{5", "a box that does not close"),
    (r"-\boxed{5}", "a box around a part"),
    (r"\boxed{5}^2", "a box around a part"),
    (r"\boxed{1} then \boxed{2}", "several boxes with different contents"),
    (r"$y_1=\boxed{1}$ and $y_2=\boxed{2}$", "several boxes with different contents"),
    ("\\boxed{5}\n#### 6", "a box and an answer at #### that differ"),
    ("#### 5\nand so on", "text behind the answer at ####"),
    *((gold, "a box around a part") for gold in (r"\boxed{5}\times 10^{6}", r"- \boxed{5}", r"12 + \boxed{5}")),
    *((gold, "a box around a part") for gold in (r"\boxed{1}/2", r"\frac{\boxed{3}}{4}", r"\sqrt{\boxed{5}}")),
    *((gold, "a box around a part") for gold in (r"\boxed{5}\pi", r"\boxed{5} + 2", r"\boxed{5}!", r"1:\boxed{2}")),
    *((gold, "a box around a part") for gold in (r"x \ge \boxed{5}", r"\boxed{5} million", r"$\boxed{5}$ or $6$")),
    *((gold, "a box around a part") for gold in (r"(\boxed{3}, 4)", r"x > \boxed{3}", r"2\,\boxed{3}")),
    *((gold, "times something, or over it") for gold in ("y = 1/2x + 3", "4/3πr^3", "1/2(x+1)", "1/2pi", "a/bc")),
    *((gold, "a digit behind a letter") for gold in ("x2 + y2 = 25", "1A3", "2h 30m", "7 r 1", "3 x 4", "3C2", "H2O")),
    *((gold, "a digit behind a letter") for gold in ("x1 = 3, x2 = 4", r"\pi r2")),
    *((gold, "no answer") for gold in ("N/A", "None", "TBD", "unknown")),
    *((gold, "a time") for gold in ("5pm", "10 am")),
    ("0x1F", "digits of another base"),
    ("7 (mod 11)", "a remainder"),
    ("x1^2 + x2^2 = 5", "a digit behind a letter"),
    *((gold, "a unit, or a variable") for gold in ("3 m", "2 s", r"\frac{1}{2} h")),
    (r"x=0, y=1 \text{ or } x=1, y=0", "several unknowns"),
    ("log2(8)", "a base, or a factor"),
    *((gold, "thousands, or several numbers") for gold in (r"1,152\pi", "1,234x", "1,250/3", "1,152°", "1,234^2")),
    ("2,75x", "a decimal comma, or two numbers"),
    ("1,25%", "a decimal comma, or two numbers"),
    ("5 foo bar", "the text 'foo'"),
    ("<b>5</b>", "markup"),
    ("so " * 1000, "a text of 2999 characters"),
]


def boxed(answer: str) -> str:
    return rf"We find that the answer is $\boxed{{{answer}}}$."


def test_the_table_is_large():
    assert len(READ) >= 120
    assert len(REFUSED) >= 60


@pytest.mark.parametrize(("gold", "right", "wrong"), READ, ids=[str(row[0])[:40] for row in READ])
def test_right_answers_are_paid_and_wrong_ones_are_not(gold, right, wrong):
    answers = [*right, *wrong]
    rewards = accuracy_reward([boxed(answer) for answer in answers], [gold] * len(answers))
    verdicts = dict(zip(answers, rewards, strict=True))
    assert verdicts == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0), read_gold(gold)


@pytest.mark.parametrize("gold", [row[0] for row in READ], ids=[str(row[0])[:40] for row in READ])
def test_what_is_read_is_read_as_itself(gold):
    assert read_gold(read_gold(gold)) == read_gold(gold)


@pytest.mark.parametrize(("gold", "reason"), REFUSED, ids=[str(row[0])[:40] for row in REFUSED])
def test_what_is_not_surely_understood_is_refused(gold, reason):
    with pytest.raises(UnreadableGold) as refusal:
        read_gold(gold)
    assert reason in str(refusal.value)
    assert accuracy_reward([boxed("5")], [gold]) == [None]


@pytest.mark.parametrize("gold", [None, "", "  ", math.nan, [], [None]])
def test_no_reference(gold):
    assert read_gold(gold) is None
