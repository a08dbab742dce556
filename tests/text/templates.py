"""Chat templates in the styles that models use, written for the tests."""

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HERMES = """\
{%- macro kind(spec) -%}
    {%- if spec.type == 'array' %}list[{{ kind(spec['items']) }}]
    {%- elif spec.type is string %}{{ spec.type }}
    {%- else %}{{ spec.type | join(' | ') }}
    {%- endif -%}
{%- endmacro -%}
{%- if tools %}
<|im_start|>system
{%- if messages[0].role == 'system' %}
{{ messages[0].content }}
{% endif %}
# Tools

<tools>
{%- for tool in tools %}
{{ tool | tojson }}
  {%- if tool.function.parameters.properties is defined %}
    {%- for name, spec in tool.function.parameters.properties | items %}
 {{ loop.index }}/{{ loop.length }} {{ name }}: {{ kind(spec) }}
    {%- endfor %}
  {%- endif %}
{%- endfor %}
</tools><|im_end|>
{%- endif %}
{%- set ns = namespace(last=-1, calls=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first and tools %}{% continue %}{% endif %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{% endif %}
    {%- elif message.tool_calls %}
<|im_start|>assistant
        {%- if message.content %} {{ message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
        {%- endfor %}<|im_end|>
    {%- elif message.role == 'assistant' and loop.index0 < ns.last %}
<|im_start|>assistant
{{ message.content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>
    {%- else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}
{%- endif %}"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{ 'Environment: ipython\\n' }}{% endif %}
{{- 'Today: ' ~ date_string ~ '\\n' ~ (tools | length if tools else 0) ~ ' tools\\n\\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{ '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model takes one tool call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '<|python_tag|>' + call.name + '.call(' }}
        {%- for name, value in call.arguments | items %}
            {{- name + '="' ~ value ~ '"' }}
            {%- if not loop.last %}{{ ', ' }}{% endif %}
        {%- endfor %}
        {{- ')<|eom_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- {'output': message.content} | tojson }}<|eot_id|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set first = messages[0]['content'] + '\\n\\n' %}
    {%- else %}
        {%- set first = messages[0]['content'][0]['text'] + '\\n\\n' %}
    {%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set first = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- elif message['content'] is iterable %}
        {%- for item in message['content'] %}
            {%- if item['type'] == 'image' %}{{ '<image>' }}{% elif item['type'] == 'text' %}
            {{- item['text'] | trim }}{% endif %}
        {%- endfor %}
    {%- else %}
        {{- raise_exception('Invalid content type') }}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

STRICT = """\
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unexpected message role.') }}
    {%- endif %}
    {{- '<' + message.role + '>' + message.content + '\\n' }}
{%- endfor %}"""

FORGETFUL = """\
{%- if messages[0].role in ['system', 'developer'] %}
    {{- '<developer>' + messages[0].content + '\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ['user', 'assistant', 'tool'] %}
        {{- '<' + message.role + '>' + message.content + '\\n' }}
    {%- endif %}
{%- endfor %}"""

MACROS = """\
{%- macro write(content) %}
    {%- if content is string %}{{ content }}{% else %}
    {%- for item in content %}{% if 'text' in item %}{{ item.text }}{% endif %}{% endfor %}{% endif %}
{%- endmacro %}
{%- for message in messages | rejectattr('role', 'equalto', 'system') %}
{% generation %}[{{ message.role | upper }}] {{ write(message.content) }}{% endgeneration %}

{% endfor %}
{%- set names = messages | map(attribute='role') | unique | list %}
{%- filter upper %}{{ names | join(', ') }}{% endfilter %}
{%- set text %}{{ '%s has %d' % (names[0], names | length) }} {{ '{:>5}|{x}'.format('a', x=1) }}{% endset %}
{{ text | replace(' ', '_') | indent(2, true) }} {{ names[-1][::-1] }} {{ messages | length * 2 ** 3 // 5 }}
{% for key, value in {'b': 1, 'a': [1, 2]} | dictsort %}{{ key }}={{ value }};{% endfor %}
{%- for n in range(20) if n % 3 == 0 %}{% if n > 12 %}{% break %}{% endif %}{{ n }}
{{- loop.last }}{% endfor %}
{{ dict(a=1, b='é') | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }} {{ missing }}
{{ ['x'] * 3 + ['y'] }} {{ [3, 1] | sort | first }} {{ 'ab'.center(7) }}{{ none }} {{ 7 / 2 }}
{{ '1,2'.split(',') }}
{%- if eos_token %}{{ eos_token }}{% endif %}"""

PARTS = """\
{%- for message in messages %}
{%- set content = message.get('content') %}
{{- message.role }}: {% for part in content | selectattr('type', 'equalto', 'text') %}
{{- part.text }}{% endfor %}
{% endfor %}"""

ALL = {
    "chatml": CHATML,
    "hermes": HERMES,
    "llama": LLAMA,
    "gemma": GEMMA,
    "macros": MACROS,
}
