"""Answers as families of models write them, from their published chat templates, and what is in them."""

from dataclasses import dataclass, field

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"enum": ["celsius", "fahrenheit"]},
                "hourly": {"type": "boolean"},
                "where": {"$ref": "#/$defs/place"},
                "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            },
            "$defs": {"place": {"type": "object"}},
        },
    },
}
WRITE = {
    "type": "function",
    "function": {
        "name": "write_file",
        "parameters": {"properties": {"path": {"type": "string"}, "content": {"type": "string"}}},
    },
}
TIME = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, WRITE, TIME]

BERLIN = ("get_weather", {"city": "Berlin", "days": 3})
PARIS = ("get_weather", {"city": "Paris"})
CODE = 'if a < b:\n    print("</tool_call> & {x}")\n\n'
FILE = ("write_file", {"path": "a.py", "content": CODE})
NOW = ("now", {})


@dataclass(frozen=True)
class Transcript:
    """An answer and what is in it: reasoning, text, and calls as (name, arguments)."""

    name: str
    tools: str
    answer: str
    calls: tuple[tuple[str, object], ...] = ()
    text: str = ""
    reasoning: str = ""
    thinking: str = "none"  # name of the format of reasoning
    ids: tuple[str, ...] = field(default=())


QWEN_CODE = f"""<tool_call>
<function=write_file>
<parameter=path>
a.py
</parameter>
<parameter=content>
{CODE}
</parameter>
</function>
</tool_call>"""

TRANSCRIPTS = [
    Transcript(
        "hermes",
        "hermes",
        'I will look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin", '
        '"days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"city": "Paris"}, "name": "get_weather"}\n</tool_call>',
        (BERLIN, PARIS),
        "I will look.",
    ),
    Transcript(
        "qwen3 thinks",
        "hermes",
        "<think>\nThey want <tool_call> and }{.\n</think>\n\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        (NOW,),
        reasoning="They want <tool_call> and }{.",
        thinking="qwen3",
    ),
    Transcript(
        "hermes with a file",
        "hermes",
        '<tool_call>{"name": "write_file", "arguments": {"path": "a.py", "content": '
        '"if a < b:\\n    print(\\"</tool_call> & {x}\\")\\n\\n"}}</tool_call> done',
        (FILE,),
        "done",
    ),
    Transcript("qwen3 coder", "qwen3_coder", f"Here:\n{QWEN_CODE}", (FILE,), "Here:"),
    Transcript(
        "qwen3 coder without the outer tag",
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\nBerlin\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        (BERLIN, NOW),
    ),
    Transcript(
        "types by the schema",
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>"
        "\n7.0\n</parameter>\n"
        '<parameter=hourly>\nTrue\n</parameter>\n<parameter=where>\n{"lat": 1.5}\n</parameter>\n'
        "<parameter=units>\ncelsius\n</parameter>\n<parameter=tags>\nnull\n</parameter>\n"
        "<parameter=new>\n[1]\n</parameter>\n</function>\n</tool_call>",
        (
            (
                "get_weather",
                {
                    "city": "12",
                    "days": 7,
                    "hourly": True,
                    "where": {"lat": 1.5},
                    "units": "celsius",
                    "tags": None,
                    "new": [1],
                },
            ),
        ),
    ),
    Transcript(
        "seed",
        "seed_oss",
        "<seed:think>Hm.</seed:think>Wait.<seed:tool_call>\n<function=get_weather>\n<parameter=city>"
        "Paris</parameter>\n"
        "</function>\n</seed:tool_call>",
        (PARIS,),
        "Wait.",
        "Hm.",
        "seed_oss",
    ),
    Transcript(
        "llama 3",
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Berlin", "days": 3}}; {"type": "function", "name": "now", '
        '"parameters": {}}',
        (BERLIN, NOW),
    ),
    Transcript(
        "llama 3 with its tag", "llama3_json", '<|python_tag|>{"name": "now", "parameters": null}', (NOW,)
    ),
    Transcript(
        "llama 3 built-in",
        "llama3_json",
        '<|python_tag|>brave_search.call(query="the \\"best\\" price")',
        (("brave_search", {"query": 'the "best" price'}),),
    ),
    Transcript("llama 3 JSON", "llama3_json", '{"name": "Bob", "age": 7}', text='{"name": "Bob", "age": 7}'),
    Transcript(
        "pythonic",
        "pythonic",
        "[get_weather(city='Berlin', days=3), now(), write_file(path='a.py', content='if a < b:\\n    "
        'print("</tool_call> & {x}")\\n\\n\')]',
        (BERLIN, NOW, FILE),
    ),
    Transcript(
        "pythonic values",
        "pythonic",
        '[now(a=[1, -2.5e3, (True, None),], b={"k": {"x": False}, 1: "\\u00e9\\x41"}, c=Enum.X, '
        'd=0x10, e="""q"q""", f=.5)]',
        (
            (
                "now",
                {
                    "a": [1, -2500.0, [True, None]],
                    "b": {"k": {"x": False}, "1": "\u00e9A"},
                    "c": "Enum.X",
                    "d": 16,
                    "e": 'q"q',
                    "f": 0.5,
                },
            ),
        ),
    ),
    Transcript("no pythonic call", "pythonic", "[1] Smith (2020), p. 3]", text="[1] Smith (2020), p. 3]"),
    Transcript(
        "llama 4",
        "llama4_pythonic",
        '<|python_start|>[get_weather(city="Berlin", days=3)]<|python_end|>',
        (BERLIN,),
    ),
    Transcript(
        "lfm2",
        "lfm2",
        '<|tool_call_start|>[get_weather(city="Paris"), now()]<|tool_call_end|>Checking.',
        (PARIS, NOW),
        "Checking.",
    ),
    Transcript(
        "olmo3",
        "olmo3",
        'Yes.\n<function_calls>get_weather(city="Paris")\nnow()</function_calls>',
        (PARIS, NOW),
        "Yes.",
    ),
    Transcript(
        "mistral",
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}, "id": "VvvODy9mT"}, '
        '{"name": "now", "arguments": {}}]',
        (BERLIN, NOW),
    ),
    Transcript(
        "magistral",
        "mistral_v11",
        '[THINK]Let me see.[/THINK]I look.[TOOL_CALLS]get_weather[ARGS]{"city": "Berlin", "days": 3}[TOOL_CALLS]now'
        "[CALL_ID]abcdefghi[ARGS]{}",
        (BERLIN, NOW),
        "I look.",
        "Let me see.",
        "mistral",
    ),
    Transcript(
        "deepseek v3",
        "deepseek_v3",
        "<think>\nHm\n</think>\n\nOk.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        '```json\n{"city": "Berlin", "days": 3}\n```<｜tool▁call▁end｜>'
        "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n"
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (BERLIN, NOW),
        "Ok.",
        "Hm",
        "deepseek_r1",
    ),
    Transcript(
        "deepseek v3.1",
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Berlin", "days": 3}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (BERLIN, NOW),
    ),
    Transcript(
        "deepseek v3.2",
        "deepseek_v32",
        'Let me.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">'
        '\n<｜DSML｜parameter name="city" string='
        '"true">Berlin</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        (BERLIN, NOW),
        "Let me.",
    ),
    Transcript(
        "kimi k2",
        "kimi_k2",
        "Sure.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Berlin", "days": 3}<|tool_call_end|><|tool_call_begin|>'
        "functions.now:1<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        (BERLIN, NOW),
        "Sure.",
        ids=("functions.get_weather:0", "functions.now:1"),
    ),
    Transcript(
        "glm 4.5",
        "glm45",
        "<think>a\nb</think>\nLook.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Berlin</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        (BERLIN, NOW),
        "Look.",
        "a\nb",
        "glm45",
    ),
    Transcript(
        "glm 4.7",
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Berlin</arg_value><arg_key>"
        "days</arg_key><arg_value>3"
        "</arg_value></tool_call><tool_call>now</tool_call>",
        (BERLIN, NOW),
    ),
    Transcript(
        "gpt-oss",
        "openai",
        "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary<|message|>I will look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Berlin", "days": 3}<|call|>',
        (BERLIN,),
        "I will look.",
        "Need it.",
    ),
    Transcript(
        "gpt-oss, recipient first",
        "openai",
        " to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        (NOW,),
    ),
    Transcript(
        "gpt-oss answers",
        "none",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
        text="Four.",
        reasoning="Easy.",
        thinking="openai_gptoss",
    ),
    Transcript(
        "minimax m2",
        "minimax_m2",
        'Ok.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Berlin</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        (BERLIN, NOW),
        "Ok.",
    ),
    Transcript(
        "functiongemma",
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Berlin<escape>,days:3}<end_function_call>",
        (BERLIN,),
    ),
    Transcript(
        "gemma 4",
        "gemma4",
        '<|channel>thought\nHm.<channel|>See.<|tool_call>call:get_weather{city:<|"|>Berlin<|"|>'
        ",days:3,where:{a:[1,true],"
        'b:<|"|>{"x"}<|"|>}}<tool_call|><|tool_call>call:now{}<tool_call|>',
        (
            ("get_weather", {"city": "Berlin", "days": 3, "where": {"a": [1, True], "b": '{"x"}'}}),
            NOW,
        ),
        "See.",
        "Hm.",
        "gemma4",
    ),
    Transcript(
        "granite",
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}}]',
        (BERLIN,),
    ),
    Transcript(
        "granite thinks",
        "none",
        "Here is my thought process:\nTwo and two.\n\nHere is my response:\nFour.",
        text="Four.",
        reasoning="Two and two.",
        thinking="granite",
    ),
    Transcript(
        "granite 20b",
        "granite-20b-fc",
        '<function_call> {"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}}<function_call> '
        '{"name": "now", "arguments": {}}',
        (BERLIN, NOW),
    ),
    Transcript(
        "phi 4 mini",
        "phi4_mini_json",
        'functools[{"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}}, {"name": '
        '"now", "arguments": {}}]',
        (BERLIN, NOW),
    ),
    Transcript(
        "phi 4 mini with tags",
        "phi4_mini_json",
        '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>',
        (NOW,),
    ),
    Transcript(
        "step 3",
        "step3",
        "<think>x</think>Go.<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="get_weather">'
        '<steptml:parameter name="city">Berlin</steptml:parameter><steptml:parameter name="days">'
        "3</steptml:parameter>"
        '</steptml:invoke><｜tool_call_end｜>\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="now">'
        "</steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>",
        (BERLIN, NOW),
        "Go.",
        "x",
        "step3",
    ),
    Transcript(
        "ernie",
        "ernie45",
        "<think>\nok\n</think>\n\n<response>\nHello.\n</response>\n\n"
        '<tool_call>\n{"name": "now", "arguments": "{}"}\n</tool_call>',
        (NOW,),
        "Hello.",
        "ok",
        "ernie45",
    ),
    Transcript(
        "hunyuan",
        "hunyuan_a13b",
        "<think>\nok\n</think>\n<answer>\nHello.\n</answer>"
        '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}}]</tool_calls>',
        (BERLIN,),
        "Hello.",
        "ok",
        "hunyuan_a13b",
    ),
    Transcript(
        "cohere",
        "cohere_command3",
        '<|START_THINKING|>Plan.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", '
        '"tool_name": "get_weather", '
        '"parameters": {"city": "Berlin", "days": 3}}\n]<|END_ACTION|>',
        (BERLIN,),
        reasoning="Plan.",
        thinking="cohere_command3",
    ),
    Transcript(
        "OpenAI's form",
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}</tool_call>',
        (NOW,),
    ),
]
