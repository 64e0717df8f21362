#!/usr/bin/python3
"""What Python's Jinja2 makes of templates, set up as Hugging Face's transformers does for chat.

    make_jinja_cases.py > jinja_cases.json       small templates of ours, see CASES below
    make_jinja_cases.py --templates FILE...      whole chat templates, many conversations each

Prints JSON: [{"t": template, "v": variables, "out": text, or null where it fails, "e": the message
where the template itself raised it}, ...].  Needs python3-jinja2.  The clock stands at NOW in UTC."""
import datetime
import functools
import json
import os
import sys
import time

os.environ["TZ"] = "UTC"
time.tzset()

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = 1700000000


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_run"), [], [], body).set_lineno(line)

    def _run(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def strftime_now(format):
        return datetime.datetime.fromtimestamp(NOW).strftime(format)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


ENV = environment()
compiled = functools.lru_cache(maxsize=2)(ENV.from_string)


def case(template, variables, label=None):
    r = {"t": template, "v": variables, "out": None}
    try:
        r["out"] = compiled(template).render(**json.loads(json.dumps(variables)))
        r["out"].encode()
        if " at 0x" in r["out"]:  # an address: lorad refuses to print such a thing
            r["out"] = None
    except jinja2.exceptions.TemplateError as e:
        r["out"] = None
        if type(e) is jinja2.exceptions.TemplateError:
            r["e"] = str(e)
    except Exception:
        r["out"] = None
    if label is not None:
        r["label"] = label
        del r["t"]
    return r


# --- small templates -------------------------------------------------------------------------------

V = {
    "s": "Hello, World", "u": "Żółć 日本 🙂 ß", "e": "", "n": None, "i": 7, "z": 0, "neg": -7,
    "f": 2.5, "t": True, "q": "it's \"quoted\"\n\ttab\\", "html": "<a href='x'>&</a>",
    "l": [3, 1, 2], "ls": ["b", "A", "c", "a"], "el": [], "d": {"b": 1, "a": [1, 2], "C": None},
    "ed": {}, "nested": {"x": {"y": [{"z": "deep"}]}}, "ctrl": "a\u0000b\u007f\u00a0c\u2028d\u200be",
    "users": [{"name": "bob", "age": 30, "ok": True}, {"name": "Al", "age": 25},
              {"name": "cy", "age": 30, "ok": False, "sub": {"k": 2}}],
    "lines": "one\ntwo\r\nthree\n\nfive", "mix": [1, 1.0, "1", None, True, [1], {"a": 1}],
    "fl": [0.1, 1e16, 1e-5, 123456789.123, 1e22, -0.0, 5e-324, 1.7976931348623157e308, 100.0, 0.0001],
    "items": {"items": 1, "keys": 2}, "pad": "  x y  ", "nbsp": "\u00a0x\u2003",
    "odd": "a\vb\fc\x1cd\x85e\u2028f\u2029g",
}

EXPRESSIONS = r"""
1 | 1.0 | -1 | +5 | 007 | 1_000 | 0x1F | 0b101 | 0o17 | 1e3 | 1.5e-7 | 1_0.2_5 | 1e400 | 'a' "b" | 'a\n\t\\\'' | '\x41\u00e9\U0001F642\101' | '\d\é' | "tab\	x"
true | True | false | False | none | None | missing | [] | () | (1,) | (1, 2) | [1, 'a', none] | {} | {'a': 1, 'b': [2]} | {1: 2, none: 3, true: 4} | {'a': 1, 'a': 2} | 1, 2 | [1, 2,] | {'a': 1,}
1 + 2 | 1 - 2 | 2 * 3 | 7 / 2 | 6 / 2 | 7 // 2 | -7 // 2 | 7 // -2 | 7 % 3 | -7 % 3 | 7 % -3 | 7.5 % 2 | -7.5 % 2 | -7.5 // 2 | 2 ** 10 | 2 ** -1 | 2 ** 0.5 | 2 ** 3 ** 2 | -2 ** 2 | 1 / 0 | 1 // 0 | 1 % 0 | 1.0 / 0 | true + true | 0.1 + 0.2 | 1e308 * 10 | 10 ** 18 | 3 * 'ab' | 'ab' * 0 | 'ab' * -1 | [1] * 3 | (1, 2) * 2 | 'a' + 'b' | 'a' + 1 | 1 + 'a' | [1] + [2] | [1] + (2,) | (1,) + (2,) | none + 1 | missing + 1 | 1 + missing | 'a' ~ 1 ~ none ~ true ~ 2.0 | 1 ~ missing ~ 2 | [1] ~ {'a': 'b'} | 'a' - 'b' | -'a' | -true | +none | 5 - -5 | 1 - 1.0 | 2 + 3 * 4 | (2 + 3) * 4 | 10 - 2 - 3 | 2 * 3 % 4 | 1 + 1 ~ 2 + 2
1 == 1 | 1 == 1.0 | 1 == true | 1 == '1' | 'a' == 'a' | [1, 2] == [1, 2] | [1] == (1,) | {'a': 1} == {'a': 1.0} | none == none | missing == none | missing == missing2 | 1 != 2 | 1 < 2 | 2 <= 2 | 3 > 4 | 'a' < 'b' | 'a' < 1 | none < 1 | [1, 2] < [1, 3] | [1] < [1, 2] | (1, 'a') < (1, 'b') | 1 < 2 < 3 | 3 > 2 > 2 | 1 < 3 > 2 | 1 == 1 == 1 | 'Z' < 'a' | 'é' > 'z' | missing < 1 | {} < {} | true < 2 | 9007199254740993 == 9007199254740992.0 | 9007199254740993 > 9007199254740992.0
1 in [1, 2] | 3 not in [1, 2] | 'a' in 'cat' | '' in 'x' | 1 in 'x' | 'a' in {'a': 1} | 1 in {'a': 1} | 'x' in missing | missing in [1] | missing in 'a' | 1 in 5 | none in [none] | [1] in [[1]] | [1] in {'a': 1} | 1.0 in [1] | not 'a' in 'b' | 'a' not in d | 'a' in d and 'q' not in d
true and false | 1 and 2 | 0 and 2 | 1 or 2 | 0 or 'x' | '' or none | not 1 | not none | not not 1 | not missing | 1 and not 0 | missing or 'd' | missing and 1 | e or s | el and 1 | 1 if true else 2 | 1 if false else 2 | 1 if false | (1 if false) is defined | 'a' if s else 'b' if i else 'c' | 'x' if missing | ('a' if z else 'b') ~ 'c' | [1 if t, 2] | [1, 2 if z else 3]
s[0] | s[-1] | s[99] | s[1:3] | s[:-1] | s[::-1] | s[::2] | s[5:2] | s[-3:] | s[10:0:-3] | u[0] | u[1:6] | u[::-1] | u[-3] | l[0] | l[-1] | l[3] | l[1:] | l[::-1] | l[:99] | l[-99:2] | l['a'] | l[1.0] | l[true] | d['b'] | d.b | d['zz'] | d.zz | d.zz.y | d['a'][0] | d.a[1] | d.a.0 | nested.x.y[0].z | nested['x']['y'][0]['z'] | nested.q.r | n.x | n['x'] | i.x | i[0] | s.x | missing.x | missing['x'] | missing[0] | l[none] | d[none] | d[[1]] | s[1:2:0] | d[1:2] | i[1:] | l[n:2] | (1, 2, 3)[1:] | (1,2,3)[-1] | 'abc'[1] | [1,2][0] | {'a': {'b': 3}}.a.b | l[1:2, 0] | range(10)[2:5] | range(5)[-1] | l['0'] | s[missing]
items.items | items['items'] | items.keys() | items['keys'] | d.keys() | d.values() | d.items() | d.items()|list | d.get('b') | d.get('zz') | d.get('zz', 5) | d.get('C', 5) | d.get() | d.update | d.update is defined | d.pop('a') | l.append(1) | l.pop() | l.sort | l.clear() | l.index(2) | l.index(9) | l.count(3) | (1, 1).count(1) | d.copy() | l.copy() | d.setdefault('x', 1) | s.__class__ | d.__class__ | ''.__class__.__mro__ | d._x | d.foo() | s.foo() | missing() | n() | i() | s() | d.items is callable | s.upper is callable | d.clear
s.upper() | s.lower() | 'hello wORLD it\'s'.title() | 'hELLO'.capitalize() | 'aBc'.swapcase() | pad.strip() | pad.lstrip() | pad.rstrip() | 'xxaxx'.strip('x') | 'abcba'.strip('ab') | nbsp.strip() | 'a'.strip(1) | 'a b  c'.split() | 'a,b,,c'.split(',') | 'a,b,c'.split(',', 1) | ' a b c '.split(none, 1) | ' a b c '.rsplit(none, 1) | 'a,b,c'.rsplit(',', 1) | 'abc'.split('') | ''.split() | ''.split(',') | 'a-b-c'.split(sep='-', maxsplit=1) | 'aXXbXXc'.split('XX') | 'a</think>b'.split('</think>')[-1] | lines.splitlines() | lines.splitlines(true) | odd.splitlines() | odd.split() | s.startswith('He') | s.startswith(('x', 'H')) | s.endswith('ld') | s.endswith('') | s.startswith('e', 1) | s.startswith(1) | s.endswith('lo', 0, 5) | s.replace('l', 'L') | s.replace('l', 'L', 1) | s.replace('', '-') | 'ab'.replace('', '-', 2) | ', '.join(['a', 'b']) | ','.join([1]) | ''.join([]) | '-'.join('abc') | s.find('o') | s.find('o', 5) | s.find('zz') | u.find('日') | s.rfind('o') | s.rfind('zz') | s.index('W') | s.index('zz') | s.count('l') | s.count('') | 'aaa'.count('aa') | '12'.isdigit() | '1a'.isdigit() | '²'.isdigit() | '½'.isnumeric() | 'ab'.isalpha() | 'aé'.isalpha() | 'a1'.isalnum() | ' \n'.isspace() | 'A1'.isupper() | 'a1'.islower() | ''.isupper() | 'é'.isascii() | '5'.zfill(3) | '-5'.zfill(4) | 'a'.center(4) | 'ab'.center(5, '*') | 'abc'.center(6, '.') | 'a'.ljust(3) ~ '|' | 'a'.rjust(3, '0') | 'a=b=c'.partition('=') | 'a=b=c'.rpartition('=') | 'abc'.partition('x') | 'abc'.removeprefix('a') | 'abc'.removesuffix('c') | 'ß'.upper() | 'ﬁx'.upper() | 'ΑΣ ΑΣΑ Σ'.lower() | 'İ'.lower() | 'ǆ'.title() | u.upper() | u.lower() | u.title() | "they're bill's".title() | 'x'.encode() | s.upper(1) | s.strip().split(',')[0].lower()
s|length | u|length | l|count | d|length | i|length | missing|length | n|length | s|upper | i|upper | none|upper | u|lower | 'hELLO wORLD'|capitalize | 'foo-bar (baz) [q]'|title | "it's o'neil x.y"|title | 'éa ßb'|title | pad|trim | none|trim | 'xax'|trim('x') | missing|trim | 5|trim | s|replace('o', '0') | s|replace('l', 'L', 2) | 12.5|replace('.', ',') | s|replace(old='H', new='J') | missing|default('x') | n|default('x') | e|default('x') | e|default('x', true) | e|d('y', boolean=true) | z|default(1, true) | missing|default | s|default('x') | missing.x|default('a') | d.zz|default('a') | d.zz.y|default('a') | l|first | l|last | el|first | el|last | s|first | s|last | d|first | d|last | missing|first | missing|last | i|first | l|join | l|join(', ') | ls|join('-') | mix|join('|') | el|join('x') | users|join(', ', attribute='name') | s|join('.') | d|join | i|join | l|join(1) | ls|sort | ls|sort(case_sensitive=true) | l|sort | l|sort(reverse=true) | mix|sort | users|map(attribute='name')|sort|list | users|sort(attribute='age')|map(attribute='name')|list | users|sort(attribute='age,name')|map(attribute='name')|list | users|sort(attribute='zz') | d|sort | s|sort|join | ls|unique|list | [1, 1.0, true, 2]|unique|list | users|unique(attribute='age')|map(attribute='name')|list | [[1], [1]]|unique|list | l|reverse | l|reverse|list | s|reverse | d|reverse|list | i|reverse | l|list | s|list | d|list | i|list | missing|list | n|list | l|sum | el|sum | [1, 2.5]|sum | users|sum(attribute='age') | l|sum(start=10) | ls|sum | l|min | l|max | ls|min | ls|max | el|max | users|max(attribute='age') | mix|max
'5'|int | '5.9'|int | 'x'|int | 'x'|int(3) | ' 12 '|int | '1_000'|int | '0x1f'|int(0, 16) | 'ff'|int(base=16) | '0b11'|int(0, 0) | 3.99|int | -3.99|int | none|int | none|int(7) | true|int | ''|int | [1]|int | missing|int | '1e3'|int | '-7'|int | '+7'|int | '5'|float | 'x'|float | 'x'|float(1.5) | '1e3'|float | 'inf'|float | 'nan'|float | '-Infinity'|float | none|float | 3|float | ' 2.5 '|float | '1_0.5'|float | '0x10'|float | '1e'|float | missing|float | -5|abs | -2.5|abs | 'a'|abs | true|abs | 2.5|round | 3.5|round | 2.675|round(2) | 1234.567|round(-2) | 42|round | 15|round(-1) | 25|round(-1) | -15|round(-1) | 2.1|round(method='ceil') | 2.9|round(method='floor') | 2.123|round(2, 'ceil') | 2.5|round(0, 'up') | 'a'|round | 0.5|round | 1.5|round|int | 42.55|round(1, 'floor')
d|items|list | missing|items|list | l|items | n|items | d|dictsort | d|dictsort(true) | d|dictsort(by='value') | {'a': 2, 'b': 1}|dictsort(by='value') | {'a': 2, 'b': 1}|dictsort(reverse=true) | {'a': 2, 'B': 1, 'c': 3}|dictsort | l|dictsort | l|batch(2)|list | l|batch(2, 'x')|list | l|slice(2)|list | l|slice(2, 'x')|list | range(7)|batch(3)|map('sum')|list | users|groupby('age') | users|groupby('age')|map(attribute='grouper')|list | users|groupby('ok', default=false)|map('first')|list | users|map(attribute='age')|list | users|map(attribute='ok', default='?')|list | users|map(attribute='sub.k')|list | users|map(attribute='sub.k', default=0)|list | ls|map('upper')|join | ls|map('replace', 'a', 'z')|list | l|map('string')|join(',') | l|map|list | l|map('nofilter')|list | el|map|list | users|selectattr('ok')|map(attribute='name')|list | users|selectattr('ok', 'defined')|list|length | users|selectattr('age', 'equalto', 30)|list|length | users|selectattr('age', '==', 30)|map(attribute='name')|join | users|rejectattr('ok')|map(attribute='name')|list | users|rejectattr('name', 'in', ['bob'])|list|length | users|selectattr('age', 'gt', 26)|list|count | none|selectattr('x')|list | missing|selectattr('x')|list | 5|selectattr('x')|list | l|select('odd')|list | l|select|list | [0, 1, '', 'a']|select|list | l|reject('odd')|list | l|reject('equalto', 2)|list | l|select('gt', 1)|list | l|select('nope')|list | ls|select('string')|list | l|select|length | l|map('string')|length | (l|map('string'))[0] | l|select is defined | l|select is iterable | l|select is sequence | l|select|tojson | users|selectattr
html|e | html|escape | html|safe | html|e|safe | html|e|e | html|forceescape | ('<b>'|safe) + '<i>' | '<i>' + ('<b>'|safe) | ('<b>'|safe) ~ '<i>' | ('a'|safe) + 'b' + '<' | ('<%s>'|safe) % '<' | ('x<'|e).upper() | ['<'|e] | ('<'|e)|upper | ('a<'|e)|replace('a', '<') | ('<'|e)|length | ('<'|e) == '&lt;' | ('<'|safe)|tojson | ('a<b'|safe).split('<') | ('a'|safe)|string is escaped | ('a'|safe)|lower is escaped | ('a'|safe)|trim is escaped | 'a'|safe is string | ('b'|safe).replace('b', '<') | ('-'|safe).join(['<', '>']) | ('<'|safe) * 3 is escaped | ('<'|safe)[0] is escaped | n|e | 5|e | q|e
lines|indent | lines|indent(2) | lines|indent(2, true) | lines|indent(width=1, first=true, blank=true) | 'a\nb'|indent('> ') | ''|indent | 'a'|indent(4, first=true) | 'a\n'|indent ~ '|' | i|indent | missing|indent | 'a b c'|wordcount | u|wordcount | "it's fine"|wordcount | 'x'|center(5) ~ '|' | 'hello big world'|truncate(9) | 'hello big world'|truncate(9, true) | 'hello big world'|truncate(9, true, '…') | 'hello'|truncate(4) | 'hello'|truncate(2) | 'hello world foo'|truncate(8, leeway=0) | '%s-%d'|format('a', 5) | '%(x)s'|format(x=3) | '%5.2f|%-5s|%05d'|format(3.14159, 'ab', 42) | '%s'|format | '%x %X %o %e %g %c %%'|format(255, 255, 8, 12345.678, 0.0001, 'z') | '%r %s'|format('a', none) | '%+d % d'|format(3, 4) | '%d'|format('x') | '%5s|%.2s'|format('é', 'añb') | 'a%' % 1 | '%s %s' % ('a', 'b') | '%s' % 'a' | '%d' % 3.9 | '%s' % [1] | '%s' % (1,) | 'x' % 1 | 'x' % [] | '%(a)s' % {'a': 5} | '%s %s' % 'a' | '%#x' % 255 | '%.3d' % 5 | '%c' % 8364 | 'a b/c?é'|urlencode | {'a': 1, 'b c': 'd&'}|urlencode | d|attr('items') is callable | d|attr('b') is defined | s|attr('upper')() | ls|random | s|nofilter | s|pprint | s is notest
d|tojson | nested|tojson | u|tojson | q|tojson | ctrl|tojson | fl|tojson | mix|tojson | n|tojson | t|tojson | i|tojson | missing|tojson | d|tojson(indent=2) | nested|tojson(indent=4) | el|tojson(indent=2) | ed|tojson(indent=2) | [[], {}]|tojson(indent=1) | d|tojson(2) | u|tojson(true) | u|tojson(ensure_ascii=true) | {'b': 1, 'a': 2}|tojson(sort_keys=true) | {'b': 1, 1: 2}|tojson(sort_keys=true) | d|tojson(separators=(',', ':')) | d|tojson(indent=2, separators=(',', ': ')) | {1: 2, 1.5: 3, none: 4, true: 5}|tojson | {(1, 2): 3}|tojson | (1, 2)|tojson | range(3)|tojson | d.items|tojson | d.keys()|tojson | 1e400|tojson | ('nan'|float)|tojson | 1.0|tojson | 1e5|tojson | 1e-7|tojson | 123456789012345680.0|tojson | html|tojson | 'x\x7f'|tojson(ensure_ascii=true) | [1,2]|tojson(indent='--') | {'a': [1, {'b': []}]}|tojson(indent=0)
fl | fl|join(' ') | u | [u] | [q] | [ctrl] | ["it's"] | ['"'] | ['\'"'] | d | mix | nested | [none, true] | {'a': 'b'}|string | (1,)|string | 1e16 | 1e15 | 123456789012345678 | 1e100 | 0.00001 | 0.0001 | 1.10 | 1/3 | 2/3 | 100/3 | 1e-300 | -0.0 | 5e-324 | 3.0 | 1e22 | 1e23 | 2.5e-5 | ['\u200b', '\u0301', '\ud7ff', '\ue000', '\u00ad', '\U0001f642', '\u3000']
missing is defined | missing is undefined | n is defined | n is none | s is string | i is number | f is number | t is number | t is integer | i is integer | f is float | t is boolean | z is boolean | d is mapping | l is mapping | l is sequence | s is sequence | d is sequence | i is sequence | missing is sequence | l is iterable | s is iterable | i is iterable | missing is iterable | n is iterable | range is callable | s is callable | missing is callable | i is odd | i is even | 4 is even | 3.0 is odd | 'a' is odd | 9 is divisibleby 3 | 9 is divisibleby(2) | 9 is divisibleby 0 | 1 is eq 1 | 1 is equalto(2) | 1 is ne 2 | 2 is gt 1 | 2 is ge(2) | 1 is lt 2 | 1 is le 0 | 1 is greaterthan 0 | 1 is lessthan 0 | 1 is in [1, 2] | 'a' is in 'abc' | 1 is not in [1] | true is true | 1 is true | false is false | none is false | 'abc' is lower | 'aBc' is lower | 'ABC1' is upper | '' is lower | '1' is upper | none is sameas none | 1 is sameas 1 | n is not none | s is not defined | not s is defined | not missing is defined | i is divisibleby 7 and t | s is string and i is string | i is odd or false | 1 is odd is even | 'upper' is filter | 'nope' is filter | 'odd' is test | d.b is defined | d.q is defined | d['C'] is none | 5 is number | 'x' is escaped | l is eq [3, 1, 2] | i is == 7 | f is integer | 2 is not odd | missing is none | not 1 == 2 | -1|abs | -i|abs | 2 ** -1|abs | (1, 2)|length | [1, 2]|length == 2 | s|upper ~ '!' | 'a' ~ 'b'|upper | 1 + l|length | s|length > 5 and l|length < 5 | s.upper()|lower | not l|length | {'a': 1}|length
range(3) | range(1, 4)|list | range(5, 0, -2)|list | range(0)|list | range(1, 9, 3) | range(200000) | range(1, 2, 0) | range(2.5) | range('a') | range(3)|length | 2 in range(3) | range(3) == range(3) | dict(a=1) | dict({'a': 1}, b=2) | dict([('a', 1)]) | dict(5) | namespace(a=1).a | namespace(a=1) | namespace({'x': 2}).x | namespace().y | namespace().y is defined | namespace(a=1)|tojson | namespace(a=1)['a'] | raise_exception('bad: ' ~ s) | raise_exception() | strftime_now('%Y-%m-%d') | strftime_now('%d %b %Y %H:%M:%S %j %A %B %%') | strftime_now('') | strftime_now(5) | range(*[1, 3])|list | dict(**{'a': 1}) | dict(**[1]) | '%s'|format(*['a']) | s.split(*[',']) | dict(a=1, a=2) | s.replace('l', **{'new': 'L'}) | foo(1) | loop | self is defined | caller | lipsum is defined
"""

TEMPLATES = [
    # white space
    "a\n{% if true %}\nb\n{% endif %}\nc", "a\n  {% if true %}  \n  b\n  {% endif %}  \nc\n",
    "{% if true %}\n\nx{% endif %}", "a {%- if true -%} b {%- endif -%} c", "a\n {{- ' x ' -}} \n b",
    "a\n  {{ 'x' }}\n  b\n", "  {{+ 'x' }}", "{%+ if true %}x{% endif %}", "  {%+ if true %}\nx{% endif +%}\ny",
    "  {% if true +%}\nx{% endif %}", "x{# c #}\ny", "  {# c #}\ny", "x {#- c -#} y", "x\n  {#+ c +#}\ny", "a{# {{ x }} {% if %} #}b",
    "a\n\n\n", "\n", "", "a\r\nb\rc\r\n", "{% raw %}{{ x }}{% if %}{% endraw %}", "a  {%- raw -%}  {{ x }}  {%- endraw -%}  b",
    "  {% raw %}\n{{ x }}\n  {% endraw %}\ny", "{% raw %}{# #}{% endraw +%}\nx", "{%- raw %} a {% endraw -%} b", "a{% raw -%}\n b{% endraw %}\n\nc",
    "\u00a0{%- if true %}x{% endif -%}\u2003 y", "a\t {% set x = 1 %}\t\nb", "a{% set x = 1 %}  {% set y = 2 %}\nb",
    "  {% set x = 1 %}{% set y = 2 %}\n  {{ x }}", "\n  {%- set x = 1 %}\n  b", "x\n{{ 'a' }}\n  {% if true %}b{% endif %}\n",
    "{{ '}}' }}{{ '{%' }}", "{{ {'a': {'b': 1}}.a.b }}", "{{ {'a': 1}}}", "{% if true -%}\n\n a\n\n{%- endif %}", "{{'a'}}{{-'b'-}}{{'c'}}",
    "a }} b %} c #} d", "{ { x } }", "{{", "{%", "{#", "{{ 'a", "{{ a", "{% if", "{% if true %}", "{% endif %}", "{% raw %}", "{{ }}", "{% %}",
    "{{ 1 2 }}", "{{ ( }}", "{{ ) }}", "{{ [1, }}", "{{ a. }}", "{{ a| }}", "{{ a is }}", "{{ 'a' 'b' }}", "{{ a ! b }}", "{{ $ }}", "{{ {1} }}", "{{ a b }}",
    "{{ -%}", "{% if x }}{% endif %}", "{{ '\\x4' }}", "{{ '\\u12' }}", "{{ f(a=1, 2) }}", "{{ f(**a, *b) }}", "{{ 1 if }}", "{{ not }}", "{{ é }}", "{{ 1é }}",
    "{{ a.1.2 }}", "{{ 1.a }}", "{{ 1..2 }}", "{{ 5.upper }}", "{{ a..b }}", "{{ 1.5.6 }}", "{%- -%}", "{{-1}}", "{{ -1 }}", "{{+1}}", "{{ - 1 }}",
    # statements
    "{% if z %}a{% elif i %}b{% else %}c{% endif %}", "{% if z %}a{% elif e %}b{% elif n %}x{% else %}c{% endif %}", "{% if missing %}a{% endif %}",
    "{% if i %}{% if z %}a{% else %}b{% endif %}{% else %}c{% endif %}", "{% if 1, 2 %}a{% endif %}", "{% if i: %}a{% endif %}", "{% if %}a{% endif %}",
    "{% for x in l %}{{ x }},{% endfor %}", "{% for x in el %}{{ x }}{% else %}none{% endfor %}", "{% for x in s %}[{{ x }}]{% endfor %}",
    "{% for k in d %}{{ k }} {% endfor %}", "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}", "{% for k, v in d|items %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in d|dictsort %}{{ k }}={{ v }};{% endfor %}", "{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }} {% endfor %}", "{% for a, b in [(1, 2, 3)] %}{% endfor %}",
    "{% for a, b in [1] %}{% endfor %}", "{% for a, b in ['xy'] %}{{ a }}{{ b }}{% endfor %}", "{% for x in i %}{% endfor %}", "{% for x in n %}{% endfor %}",
    "{% for x in missing %}{% else %}empty{% endfor %}", "{% for x in l if x > 1 %}{{ loop.index }}:{{ x }} {% endfor %}", "{% for x in l if x > 9 %}a{% else %}b{% endfor %}",
    "{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }} {% endfor %}",
    "{% for x in l %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }} {% endfor %}", "{% for x in l %}{{ loop.previtem is defined }}{{ loop.nextitem is undefined }} {% endfor %}",
    "{% for x in l %}{{ loop.previtem.a }}{% endfor %}", "{% for x in l %}{{ loop.cycle('a', 'b') }}{% endfor %}", "{% for x in l %}{{ loop.cycle() }}{% endfor %}",
    "{% for x in [1, 1, 2, 2, 1] %}{{ loop.changed(x) }} {% endfor %}", "{% for x in l %}{{ loop.depth }}{{ loop.depth0 }}{% endfor %}", "{% for x in l %}{{ loop }}{% endfor %}", "{% for x in l %}{{ loop.foo }}{{ loop.foo is defined }}{% endfor %}",
    "{% for x in l %}{% for y in ls %}{{ loop.index }}{% endfor %}{{ loop.index }} {% endfor %}", "{% for x in l %}{% set o = loop %}{% for y in 'ab' %}{{ o.index }}{{ loop.index }} {% endfor %}{% endfor %}",
    "{% for x in l|map('string') %}{{ loop.length }}{{ loop.last }}{% endfor %}", "{% for x in l if x != 1 %}{{ loop.length }}{{ loop.last }}{{ loop.nextitem }} {% endfor %}",
    "{% for x in l if x != 1 %}{{ loop.last }}{{ loop.length }} {% endfor %}", "{% for x in [1, 2, 3, 4] %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in [1, 2, 3, 4] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{{ loop.last }}{% endfor %}", "{% for x in l %}{% break %}{% else %}e{% endfor %}", "{% break %}", "{% macro m() %}{% break %}{% endmacro %}",
    "{% for x in l %}{% for y in l %}{% if y == 1 %}{% break %}{% endif %}{{ y }}{% endfor %};{% endfor %}", "{% for x in l %}{% set a %}q{% break %}{% endset %}{% endfor %}z",
    "{% for x in l recursive %}{{ x }}{% endfor %}", "{% for n in [{'v': 1, 'c': [{'v': 2, 'c': [{'v': 3}]}]}] recursive %}{{ n.v }}{{ loop.depth }}{% if n.c %}({{ loop(n.c) }}){% endif %}{% endfor %}", "{% for x in l %}{{ loop([1]) }}{% endfor %}",
    "{% for x in 1, 2 %}{{ x }}{% endfor %}", "{% for x in (1 if t else 2, 3) %}{{ x }}{% endfor %}", "{% for loop in l %}{% endfor %}", "{% for x.y in l %}{% endfor %}", "{% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}", "{% for x in l %}{{ x }}", "{% for x of l %}{% endfor %}",
    "{% for i in l %}{{ i }}{% endfor %}{{ i }}", "{% for x in l %}{% set z = x %}{% endfor %}{{ z }}", "{% set y = 0 %}{% for x in l %}{% set y = y + x %}{{ y }} {% endfor %}{{ y }}", "{% for x in l %}{{ y }}{% set y = x %}{% endfor %}", "{% for x in l %}{% if x == 1 %}{% set s = 'in' %}{% endif %}{{ s }} {% endfor %}{{ s }}",
    "{% set ns = namespace(c=0) %}{% for x in l %}{% set ns.c = ns.c + x %}{% endfor %}{{ ns.c }}", "{% set ns = namespace() %}{% set ns.a = 1 %}{{ ns.a }}{{ ns.b }}{{ ns }}", "{% set d.x = 1 %}", "{% set missing.x = 1 %}", "{% set x = 5 %}{% set x = x + 1 %}{{ x }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set (a, b) = [1, 2] %}{{ a }}{{ b }}", "{% set a, b = [1] %}", "{% set a = 1, 2 %}{{ a }}", "{% set 5 = 1 %}", "{% set a.b.c = 1 %}", "{% set a[0] = 1 %}", "{% set true = 1 %}", "{% set x %}a{{ i }}b{% endset %}[{{ x }}]", "{% set x | upper | replace('A', 'z') %}abc{% endset %}{{ x }}", "{% set x %}{% set y = 1 %}{{ y }}{% endset %}{{ x }}{{ y }}", "{% set x = 1 if z else 2 %}{{ x }}", "{% if t %}{% set x = 1 %}{% endif %}{{ x }}", "{% set x = namespace(l=[]) %}{% for y in l %}{% set x.l = x.l + [y] %}{% endfor %}{{ x.l }}", "{% set ns = namespace(f=true) %}{% for x in [1,2,3] if ns.f %}{{ x }}{% set ns.f = false %}{% endfor %}", "{% set ns = namespace(a=1) %}{{ ns is mapping }}{{ ns.items is defined }}{{ 'a' in ns }}",
    "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}", "{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q }}", "{% set a = 5 %}{% with a = 1, b = a %}{{ a }}{{ b }}{% endwith %}{{ a }}", "{% with (a, b) = (1, 2) %}{{ a }}{{ b }}{% endwith %}",
    "{% macro m(a, b=2) %}{{ a }}-{{ b }};{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=4, a=5) }}{{ m() }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(c=1) }}", "{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}", "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, x=3) }}", "{% macro m(a) %}{{ a is defined }}{% endmacro %}{{ m() }}", "{% macro m(a) %}{{ a.x }}{% endmacro %}{{ m() }}", "{% macro m() %}{{ caller is defined }}{% endmacro %}{{ m() }}", "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{{ i }}{% endcall %}", "{% macro m() %}{% for x in l %}{{ caller(x, y=1) }}{% endfor %}{% endmacro %}{% call(a, y) m() %}<{{ a }}{{ y }}>{% endcall %}", "{% macro m() %}a{% endmacro %}{% call m() %}x{% endcall %}", "{% call 5 %}{% endcall %}", "{% macro m(n) %}{{ n }}{% if n > 0 %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}", "{% macro m() %}{{ x }}{% endmacro %}{% set x = 1 %}{{ m() }}{% set x = 2 %}{{ m() }}", "{% macro m() %}{% set i = 99 %}{{ i }}{% endmacro %}{{ m() }}{{ i }}", "{% macro m() %}  a  {% endmacro %}[{{ m()|trim }}][{{ m() }}]", "{% macro m(a, b=1, c) %}{% endmacro %}", "{% macro m(a, a) %}{% endmacro %}{{ m(1, 2) }}", "{% macro m() %}x{% endmacro %}{{ m }}{{ m.name }}{{ m is callable }}", "{{ m() }}{% macro m() %}x{% endmacro %}", "{% if t %}{% macro m() %}x{% endmacro %}{% endif %}{{ m() }}", "{% macro outer() %}{% macro inner() %}in{% endmacro %}{{ inner() }}{% endmacro %}{{ outer() }}{{ inner is defined }}", "{% for x in l %}{% macro m() %}{{ x }}{% endmacro %}{{ m() }}{% endfor %}", "{% macro m(x) %}{% if x %}yes{% endif %}{% endmacro %}{{ m(1) + m(0) + 'z' }}", "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(*[1]) }}{{ m(**{'x': 2}) }}", "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(1, x=2) }}", "{% macro f(caller) %}{{ caller }}{% endmacro %}{{ f(1) }}", "{% macro m(a=[]) %}{{ a }}{% endmacro %}{{ m() }}{{ m(none) }}",
    "{% filter upper %}abc{{ s }}{% endfilter %}", "{% filter replace('a', 'b')|upper %}aaa{% endfilter %}", "{% filter trim %}  x\n{% endfilter %}|", "{% filter nope %}{% endfilter %}", "{% if z %}{% filter nope %}{% endfilter %}{% endif %}a", "{% if z %}{{ s|nope }}{% endif %}b", "{% if t %}{{ s|nope }}{% endif %}b", "{{ (s|nope) if z else 'c' }}", "{{ s is nope if z else 'c' }}", "{% if z %}{{ s is nope }}{% endif %}d", "{% for x in el %}{{ x|nope }}{% endfor %}",
    "{% print 1, 'a' %}", "{% block a %}x{{ i }}{% endblock %}", "{% block a %}x{% endblock a %}", "{% for x in l %}{% block a scoped %}{{ x }}{% endblock %}{% endfor %}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% from 'x' import y %}", "{% unknown %}", "{% endfor %}", "{% if t %}{% endfor %}", "{% generation %}a{{ i }}{% endgeneration %}b", "  {% generation %}\n  a\n  {% endgeneration %}\nb", "{% generation %}{% set gg = 1 %}{{ gg }}{% endgeneration %}{{ gg }}",
    "{% for m in users %}{{ m['name'] }}{{ m.age }}{{ m.ok }}{% if not loop.last %}, {% endif %}{% endfor %}", "{{ users[0].name ~ users[-1]['age'] }}", "{%- for u in users %}\n{{- u.name }}\n{%- endfor %}", "{{ raise_exception('no ' + s) }}", "{% if z %}{{ raise_exception('x') }}{% endif %}ok", "{% set g = l|map('string') %}{{ g|join }}{{ g|join }}", "{% set g = l|select %}{{ 1 in g }}{{ g|list }}", "{{ users|map(attribute='name')|map('upper')|list }}", "{% set a = 'x' %}{% set b = a %}{% set a = a ~ 'y' %}{{ a }}{{ b }}{{ a ~ 'z' }}{{ a ~ 'w' }}", "{% set x = 'ab' + 'cd' %}{{ x + '1' }}{{ x + '2' }}{{ x }}",
    "{{ [1, 2, 3][1:] + [4] }}", "{{ 'a' if l else 'b' }}{{ ('a' if el else 'b') }}", "{{ l[0] if l is defined and l|length > 0 else 'none' }}", "{{ (l|length > 2) and 'many' or 'few' }}", "{{ {'a': 1}['a'] }}{{ {'a': {'b': 2}}['a'].b }}", "{{ messages[0]['role'] }}", "{{ (1, 2) in [(1, 2)] }}", "{{ '%s' % d }}", "{{ s.upper().lower().title() }}", "{{ d.items()|list|length }}", "{{ l|sort|first }}{{ l|sort|last }}", "{{ 'abc' in s|lower }}", "{{ 1 == 1 and 2 == 2 or 3 }}", "{{ not (1 == 2) }}", "{{ 1 < 2 == true }}", "{{ loop is defined }}", "{{ '\\n'.join(['a', 'b']) }}", "{{ s\n}}", "{{\n s }}\n{{ missing_on_line_3.x }}", "{# a #}{# b #}\n{# c\n d #}\nx", "{{ 1 }}{# #}{{ 2 }}", "{{ 'x' }}\n", "{{ 'x' }}\n\n", "{% if true %}\n{% endif %}\n", "{% set x = 'y' %}\n\n{{ x }}",
]


# Where lorad differs on purpose: newer Jinja refuses pop and clear as well; what no chat template
# needs is refused when it is parsed; a few things that Python refuses work.
OURS = {"l.pop()", "l.clear()", "'x'.encode()", "ls|random", "s|pprint", "s.replace('l', **{'new': 'L'})",
        "self is defined", "lipsum is defined",
        "{% macro f(caller) %}{{ caller }}{% endmacro %}{{ f(1) }}",
        "{% if z %}{% filter nope %}{% endfilter %}{% endif %}a"}


def small():
    out = []
    for line in EXPRESSIONS.strip("\n").split("\n"):
        for e in line.split(" | "):
            if e not in OURS:
                out.append(case("{{ " + e + " }}", V))
    out += [case(t, V) for t in TEMPLATES if t not in OURS]
    return out


# --- whole chat templates -------------------------------------------------------------------------------

def conversations():
    sys_ = {"role": "system", "content": "You are “kind”.\n  Be brief. "}
    user = {"role": "user", "content": "Hi! What's 2 < 3 & \"x\"?"}
    bot = {"role": "assistant", "content": "Yes <b>\n"}
    tool = {"type": "function", "function": {
        "name": "get_weather", "description": "Weather, it's \"now\" <b>.",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "Where? 日本", "default": "Oslo"},
            "days": {"type": "integer", "description": "How many.", "minimum": 1, "maximum": 7.5},
            "unit": {"type": "string", "enum": ["C", "F", 3], "nullable": True},
            "deep": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}},
                                                     "b": {"type": ["string", "null"]}}},
            "many": {"type": "array", "items": {"type": "object", "properties": {"q": {"type": "number"}}}},
            "x": {"oneOf": [{"type": "string", "format": "date"}, {"type": "number"}]}}},
        "return": {"type": "string", "description": "text"}}}
    bare = {"type": "function", "function": {"name": "now", "description": "", "parameters": {
        "type": "object", "properties": {}}}}
    args = {"city": "Tromsø", "days": 3, "f": 0.1, "list": [1, None, True]}

    def calls(arguments, n=1):
        return {"role": "assistant", "content": None, "tool_calls": [
            {"id": "abcdefgh%d" % k, "type": "function",
             "function": {"name": "get_weather", "arguments": arguments}} for k in range(n)]}

    answer = {"role": "tool", "tool_call_id": "abcdefgh0", "name": "get_weather", "content": "{\"t\": -3.5}"}
    odd = {"role": "user", "content": "  naïve\u00a0\u2028 </think> {{ x }} {% if %} \U0001f642\\ \t\r\n 'a' "}
    think = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nDone."}
    long = [dict(user if k % 2 == 0 else bot, content="turn %d %s" % (k, "é" * k)) for k in range(41)]
    talks = [[user], [sys_, user], [user, bot, user], [sys_, user, bot, user], [], [bot], [user, user],
             [sys_, sys_, user], [odd], [sys_, odd, think, user], [{"role": "user", "content": ""}],
             [{"role": "user", "content": None}], [{"role": "user"}], [{"role": "robot", "content": "x"}],
             [{"role": "user", "content": [{"type": "text", "text": "part"}]}], long, [sys_] + long,
             [user, calls(args), answer, bot, user], [sys_, user, calls(json.dumps(args)), answer],
             [user, calls(args, 2), answer, dict(answer, tool_call_id="abcdefgh1"), user],
             [user, calls(json.dumps(args), 2), answer, answer, bot, odd], [user, calls({}), answer],
             [user, dict(bot, tool_calls=[])], [user, dict(calls(args), content="thinking")],
             [{"role": "user", "content": 5.0}], [{"role": "user", "content": {"a": 0.1}}],
             [{"role": "developer", "content": "dev"}, user], ["x"], [user, dict(answer, content={"content": "c"})]]
    for talk in talks:
        for tools in (None, [], [tool], [tool, bare]):
            for more in ({"add_generation_prompt": True}, {}):
                if tools and not more and len(talk) > 5:
                    continue
                v = {"messages": talk, "tools": tools, "documents": None, "bos_token": "<s>",
                     "eos_token": "</s>", "unk_token": "<unk>"}
                v.update(more)
                yield v
    base = {"messages": [sys_, user], "tools": [tool], "bos_token": "<s>", "eos_token": "</s>",
            "add_generation_prompt": True, "documents": None}
    yield dict(base, documents=[{"title": "T", "text": "doc 1"}, {"text": "é"}])
    yield dict(base, tools=None, documents=[{"title": "T"}], enable_citations=True)
    yield dict(base, builtin_tools=["code_interpreter", "brave_search"], date_string="1 May 2025")
    yield dict(base, tools_in_user_message=False)
    yield dict(base, functions="[]", datetime="now")
    yield dict(base, functions="[]", datetime="now", messages=[user, calls("{}"), answer])
    yield dict(base, messages=[sys_, user, calls(args)], builtin_tools=["get_weather"])
    yield dict(base, tools=[{"name": "f", "description": "d", "parameter_definitions": {
        "a": {"type": "str", "description": "x", "required": True}, "b": {"type": "int", "description": "y", "required": False}}}])
    yield dict(base, tools=[{"type": "code_interpreter"}, tool])
    yield dict(base, tools=["x"])
    yield {"messages": [user]}
    yield {}


def whole(paths):
    out = []
    for path in paths:
        with open(path, encoding="utf-8", newline="") as f:
            text = f.read()
        for k, v in enumerate(conversations()):
            out.append(case(text, v, "%s, conversation %d" % (os.path.basename(path), k)))
            out[-1]["file"] = path
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == ["--templates"]:
        json.dump(whole(sys.argv[2:]), sys.stdout)
    else:
        cases = small()
        sys.stdout.write("[" + json.dumps({"v": V}) + ",\n")
        sys.stdout.write(",\n".join(json.dumps({k: c[k] for k in c if k != "v"}) for c in cases))
        sys.stdout.write("\n]\n")
