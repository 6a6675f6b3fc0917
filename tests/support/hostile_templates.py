"""Chat templates that try to break out, to change what they are given, or to use up time and memory.

As a script: renders each once, one JSON line per template: [name, outcome, seconds of computing, seconds
that it may take, peak memory of the process in MB].
"""

import json
import time

LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
BOX = (
    "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}LAST"
)


def grown(start: str, step: str, last: str = "{{ ns.x }}") -> str:
    return BOX.replace("START", start).replace("STEP", step).replace("LAST", last)


# Whatever these print must be harmless: nothing of Python's, nothing changed.
ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ namespace.__init__.__globals__['os'].popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__.os.system('id') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('id') }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "indirect format": "{{ ['{0.__class__}'|attr('format')][0](1) }}",
    "map of an attribute": "{{ ['']|map(attribute='__class__')|list }}",
    "item": "{{ ''['__class__'] }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "code": "{{ strftime_now.__code__.co_consts }}",
    "loop": "{% for m in messages %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "caller": "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}x{% endcall %}",
    "bound method": "{{ 'x'.upper.__self__.__class__ }}",
    "bytes": "{{ 'x'.encode().fromhex('41') }}",
    "namespace internals": "{{ namespace(__class__=1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "from import": "{% from 'os' import system %}{{ system('id') }}",
    "extends": "{% extends '/etc/passwd' %}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(role='x') }}",
    "clear": "{% set _ = messages.clear() %}",
    "pop": "{{ messages.pop() }}",
}
BOMBS = {
    "two loops": LOOP * 2 + END * 2,
    "two loops with text": LOOP * 2 + "x" * 8 + END * 2,
    "loops that select nothing": LOOP + "{% for j in range(99999) if false %}{% endfor %}" + END,
    "repeated text": "{{ 'a' * 1000000000 }}",
    "text, repeated": "{{ 1000000000 * 'a' }}",
    "repeated list": "{{ [0] * 1000000000 }}",
    "center filter": "{{ 'a'|center(2000000000) }}",
    "center method": "{{ 'a'.center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(2000000000) }}",
    "percent width": "{{ '%2000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (2000000000, 1) }}",
    "percent precision": "{{ '%.2000000000f' % 1.5 }}",
    "percent, many": "{{ ('%s' * 20000) % (('a' * 3000000,) * 20000) }}",
    "percent, one many times": "{{ ('%(a)s' * 40000) % {'a': 'b' * 3000000} }}",
    "format filter": "{{ '%2000000000d'|format(1) }}",
    "format width": "{{ '{:>2000000000}'.format(1) }}",
    "format nested width": "{{ '{:{w}}'.format(1, w=2000000000) }}",
    "format, one many times": "{{ ('{0}' * 80000).format('b' * 3000000) }}",
    "power": "{{ 7 ** 3000000 }}",
    "power of a power": "{{ 9 ** (9 ** 9) }}",
    "squares": grown("9", "ns.x * ns.x"),
    "round": "{{ 1.5|round(300000000, 'ceil') }}",
    "indent": "{{ ('a\\n' * 1000)|indent(1000000000) }}",
    "indented blank lines": "{{ ('\\n' * 3000000)|indent(90000, blank=true) }}",
    "lipsum of 100000": "{{ lipsum(n=100000) }}",
    "large template": "x" * 5_000_000,
    "dense template": "{{a}}" * 52_000,
    "replace filter": grown("'a'", "ns.x|replace('a', 'aaaaaaaaaa')"),
    "replace method": grown("'a'", "ns.x.replace('a', 'aaaaaaaaaa')"),
    "range": "{{ range(1000001)|list }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "doubling macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "doubling loop": "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "doubling by ~": grown("'aaaaaaaa'", "ns.x ~ ns.x"),
    "doubling by +": grown("'aaaaaaaa'", "ns.x + ns.x"),
    "list of lists": grown("[0]", "[ns.x, ns.x]"),
    "mapping of mappings": grown("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x|tojson }}"),
    "hash of tuples": grown("(0,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    "arguments of arguments": "{% macro m(n) %}{{ m(n-1, varargs, varargs) if n else varargs }}{% endmacro %}"
    "{{ m(90, 1, 1) }}",
    "namespace in itself": "{% set a = namespace() %}{% set a.x = a %}{{ a }}",
    "namespace in a list": "{% set a = namespace() %}{% set a.l = [a, a] %}{{ a.l }}",
    "comparison": "{% set ns = namespace(x=[0], y=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "sum of lists": "{{ ([range(99)|list] * 9000)|sum(start=[])|length }}",
    "join filter": "{{ range(99999)|join('a' * 3000000) }}",
    "join method": "{{ ('a' * 3000000).join(['b'] * 99999) }}",
    "chain of selects": "{{ range(99999)" + "|select" * 800 + "|list|length }}",
    "chain of maps": "{{ range(99999)" + "|map('string')" * 150 + "|list|length }}",
    "sorted text": "{{ ('ab' * 1900000)|sort|length }}",
    "title": "{{ ('a-' * 1900000)|title|length }}",
    "text to list": LOOP + "{% set x = ('a' * 3999999)|list %}" + END,
    "captured text": "{% macro m() %}"
    + LOOP * 2
    + "y" * 200_000
    + END * 2
    + "{% endmacro %}{% set x = m() %}",
    "kept slices": "{% set s = 'a' * 3999999 %}{% set ns = namespace(l=0) %}"
    + LOOP
    + "{% set ns.l = (ns.l, s[1:]) %}"
    + END,
    "reversed": "{% set s = 'a' * 3999999 %}" + LOOP + "{% set x = s|reverse %}" + END,
    "membership": "{% set l = range(99999)|list %}" + LOOP + "{{ -1 in l }}" + END,
    "growing mapping": grown("{}", "dict(ns.x, **{i|string: i})").replace(
        "range(99)", "range(99999)"
    ),
    "counted text": "{% set s = 'ab' * 1999999 %}" + LOOP + "{% set x = s.count('aab') %}" + END,
    "filter block": "{% filter upper %}" + LOOP * 2 + "abcdefgh" + END * 2 + "{% endfilter %}",
    "escapes": "{{ ('<' * 3000000)" + "|e" * 9 + " }}",
    "quoted": "{{ ('<' * 3000000)|urlencode }}",
    "number to bytes": "{{ (1).to_bytes(2000000000, 'little') }}",
    "translate": "{{ ('a' * 3000000).translate({97: 'b' * 1000000}) }}",
    "date": "{{ strftime_now('%2000000000d') }}",
    "long date": "{{ strftime_now('%c' * 100000) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "indented JSON": "{{ [[[[[[range(9999)|list]]]]]]|tojson(indent=1000000) }}",
    "separated JSON": "{{ range(9999)|list|tojson(separators=('a' * 1000000, 'b')) }}",
    "wrapped words": "{{ ('a b ' * 900000)|wordwrap(1) }}",
    "pretty printed": "{{ range(99999)|list|pprint }}",
    "links": "{{ ('http://a.b ' * 300000)|urlize }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested loops": "".join(f"{{% for a{i} in range(9) %}}" for i in range(60)) + END * 60,
    "straight line": "{% set l = [range(9999)|list] * 20 %}{% set m = [range(9999)|list] * 20 %}"
    + "{{ l == m }}" * 2000,
}
TEMPLATES = ESCAPES | BOMBS
# What is computed again and again, and never kept: the clock can stop it sooner.
ENDLESS = {
    "two loops with text",
    "loops that select nothing",
    "doubling macro",
    "chain of maps",
    "membership",
}
ENDLESS |= {"counted text"}
SOONER = 0.25  # seconds


def main() -> None:
    from mlxarch.cli.stats import process_peak_bytes
    from mlxarch.errors import ChatTemplateError
    from mlxarch.tokenizer.chat_template import ChatTemplate
    from mlxarch.tokenizer.jinja import limits

    usual = limits.MAX_SECONDS
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    for name, source in TEMPLATES.items():
        allowed = limits.MAX_SECONDS = SOONER if name in ENDLESS else usual
        start = time.process_time()  # other programs' time would count against the template
        try:
            outcome = "text: " + ChatTemplate(source, {}).render(messages)[:200]
        except ChatTemplateError as error:
            outcome = f"refused: {error}"
        seconds = time.process_time() - start
        print(
            json.dumps([name, outcome, seconds, allowed, process_peak_bytes() / 2**20]), flush=True
        )
    assert messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
    ]


if __name__ == "__main__":
    main()
