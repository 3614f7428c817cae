"""Fields of other servers and of OpenAI that are not in the Structs: which change nothing, and which cannot be had.

From the protocols of OpenAI, vLLM, SGLang, llama.cpp, TGI, Ollama, Together, OpenRouter and others. A field that is in
no Struct and no table is ignored and logged once, because clients of OpenAI's API send new ones all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from tfserve.http.messages import ChatMessage, ContentPart, ToolCall
from tfserve.http.protocol import StreamOptions
from tfserve.http.structured import ResponseFormat
from tfserve.http.tools import FunctionDefinition, NamedToolChoice, Tool


class Unsupported(NamedTuple):
    """A field that is refused: the values that ask for nothing beside the EMPTY ones, and what to do instead.

    `wishes` are EMPTY values that ask for something here.
    """

    harmless: tuple[object, ...] = ()
    instead: str = ""
    wishes: tuple[object, ...] = ()

    def asks(self, value: object) -> bool:
        """True for a value that asks for something."""
        return _is_among(value, self.wishes) or not _is_among(value, (*EMPTY, *self.harmless))


class Hint(NamedTuple):
    """A field that changes nothing in an answer: it is about billing, caching or bookkeeping."""


Fields = Mapping[str, Unsupported | Hint]

EMPTY: tuple[object, ...] = (None, False, "", [], {})
"""Values that ask for nothing, unless they are among the field's wishes."""


def _is_among(value: object, known: tuple[object, ...]) -> bool:
    """As `in`, but true is not 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in known)


_NO = Unsupported()
_OWN_ID = Unsupported(instead="send the header X-Request-Id to name the request in the log")
_JSON = "send response_format with a json_schema"
_ANY_JSON: tuple[object, ...] = ({},)  # the schema {} admits any JSON
_SCHEMA = Unsupported(instead=_JSON, wishes=_ANY_JSON)
_NO_GRAMMAR = Unsupported(instead=f"only JSON can be asked for: {_JSON}")
_LIMIT = Unsupported((-1,), "send max_tokens")
_SYSTEM = Unsupported(instead="send a message of the role system, or put it into the prompt")
_LOGPROBS = Unsupported((0,), "send logprobs")
_TEMPLATE = Unsupported(instead="the server uses the model's own template; see chat_template_kwargs")
_DOCUMENTS = Unsupported(instead="send documents in chat_template_kwargs if the template reads them")
_PREFILL = Unsupported(instead="send continue_final_message")
_BIAS = Unsupported(instead="send logit_bias")
_STOP_TEXT = Unsupported(instead="send include_stop_str_in_output")
_USAGE = Unsupported(({"include": False},), "send stream_options.include_usage")
_SEARCH = Unsupported(wishes=({},))  # {} searches with default settings
_THINKING = Unsupported(
    ({"type": "disabled"}, {"enabled": False}, {"effort": "none"}, -1),
    "what the template reads, such as enable_thinking, goes into chat_template_kwargs",
)

_SEPARATE = "send include_reasoning false to leave thoughts out, separate_reasoning false to have them in content"


def _hints(names: str) -> dict[str, Unsupported | Hint]:
    return dict.fromkeys(names.split(), Hint())


def _refused(names: str, as_: Unsupported = _NO) -> dict[str, Unsupported | Hint]:
    return dict.fromkeys(names.split(), as_)


_EVERYWHERE: Fields = {
    # OpenAI's
    **_hints("user metadata service_tier safety_identifier"),
    **_hints("prompt_cache_key prompt_cache_options prompt_cache_retention"),
    **_refused("store moderation"),
    # Where there is no prefix cache, no speculation and one server, these have what they ask for.
    **_hints("cache_salt cache_prompt cache_control n_cache_reuse id_slot n_keep extra_key session_id session_params"),
    **_hints("keep_alive custom_labels trace trace_id route models preserved_tokens backend_sampling"),
    **_hints("speculative.n_max speculative.n_min speculative.p_min speculative.type speculation draft_model ttl"),
    **_hints("ngram_corpus_id conversation_params"),
    # Parameters of samplers that are refused themselves, and what fast tokenizers never do.
    **_hints("mirostat_tau mirostat_eta xtc_threshold dynatemp_exponent smoothing_curve adaptive_decay"),
    **_hints("dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers spaces_between_special_tokens"),
    **_hints("dynatemp_low dynatemp_high"),
    **_hints("return_mm_kwargs"),
    # Grammars
    **_refused("guided_json json_schema format response_schema responseSchema", _SCHEMA),
    **_refused("json_mode output_format response_mime_type text", Unsupported(("text/plain",), _JSON)),
    **_refused("guided_regex guided_choice guided_grammar structured_outputs structural_tag", _NO_GRAMMAR),
    **_refused("grammar regex ebnf grammar_triggers grammar_lazy grammar_string", _NO_GRAMMAR),
    **_refused("guided_decoding_backend guided_whitespace_pattern"),
    # Samplers
    **_refused("use_beam_search early_stopping watermark watermarking repetition_detection"),
    **_refused("logits_processors custom_logit_processor custom_params vllm_xargs samplers sampler_order"),
    **_refused("do_sample", Unsupported((True,), "send temperature 0", wishes=(False,))),
    **_refused("typical_p typical tfs_z tfs length_penalty guidance_scale", Unsupported((1,))),
    **_refused("mirostat mirostat_mode top_a dynatemp_range dry_multiplier xtc_probability", Unsupported((0,))),
    **_refused(
        "smoothing_factor epsilon_cutoff eta_cutoff penalty_alpha no_repeat_ngram_size top_p_min", Unsupported((0,))
    ),
    **_refused("encoder_repetition_penalty num_beams beam_width", Unsupported((1,))),
    **_refused("top_n_sigma adaptive_target", Unsupported((-1, 0))),
    **_refused("min_keep", Unsupported((0, 1))),
    **_refused("repeat_penalty rep_pen", Unsupported((1,), "send repetition_penalty")),
    **_refused("repeat_last_n", Unsupported((-1, 64))),
    **_refused("prompt_ignore_length", Unsupported((0,))),
    **_refused("negative_prompt temperature_last dynamic_temperature sampler_priority"),
    **_refused("bad_words allowed_token_ids banned_tokens banned_strings custom_token_bans", _BIAS),
    **_refused("random_seed", Unsupported(instead="send seed")),
    # Lengths and stops
    **_refused("max_new_tokens n_predict num_predict max_output_tokens max_tokens_to_sample max_length", _LIMIT),
    **_refused("auto_max_new_tokens max_tokens_second"),
    **_refused("n_cmpl num_return_sequences", Unsupported((1,), "send n")),
    **_refused("min_new_tokens", Unsupported((0,), "send min_tokens")),
    **_refused(
        "truncate_prompt_tokens truncate truncation_side prompt_truncate_len truncation_length num_ctx transforms"
    ),
    **_refused("context_length_exceeded_behavior", Unsupported(("error",))),
    **_refused("truncation", Unsupported(("disabled",))),
    **_refused("n_discard n_indent", Unsupported((0,))),
    **_refused("t_max_predict_ms", Unsupported((-1, 0))),
    **_refused("stop_regex stop_sequences stop_sequence stopSequences stop_words", Unsupported(instead="send stop")),
    **_refused("no_stop_trim", _STOP_TEXT),
    **_refused("ban_eos_token", Unsupported(instead="send ignore_eos")),
    **_refused("add_bos_token", Unsupported((True,), "send add_special_tokens", wishes=(False,))),
    # More in the answer
    **_refused("prompt_logprobs", Unsupported(instead="send echo and logprobs to /v1/completions")),
    **_refused("logprob_token_ids"),
    **_refused("top_n_tokens n_probs", _LOGPROBS),
    **_refused("post_sampling_probs return_tokens_as_token_ids return_token_ids return_tokens return_prompt_text"),
    **_refused("return_token_offsets return_hidden_states return_routed_experts return_cached_tokens_details"),
    **_refused("return_prompt_token_ids return_meta_info return_progress response_fields timings_per_token details"),
    **_refused("decoder_input_details return_full_text raw_output perf_metrics_in_response"),
    **_refused("routed_experts_prompt_start routed_experts_start_len", Unsupported((0,))),
    **_refused("return_context_logits return_generation_logits verbose include"),
    **_refused("detokenize", Unsupported((True,), wishes=(False,))),
    **_refused("sse_ping_interval", Unsupported((-1,), "set server.keep_alive_s")),
    **_refused("stream_interval", Unsupported((1,))),
    **_refused("usage", _USAGE),
    # Other models, servers and inputs
    **_refused("lora lora_path lora_request adapter_id adapter_name adapters"),
    **_refused("mm_processor_kwargs media_io_kwargs images image_data images_config prompt_embeds input_embeds"),
    **_refused("input_ids", Unsupported(instead="send token ids as prompt to /v1/completions")),
    **_refused("kv_transfer_params ec_transfer_params bootstrap_host bootstrap_port bootstrap_room"),
    **_refused("data_parallel_rank routed_dp_rank disagg_prefill_dp_rank"),
    **_refused("request_id rid", _OWN_ID),
    **_refused(
        "options parameters extra_body sampling_params generation_config generationConfig model_kwargs nvext",
        Unsupported(instead="send its fields in the body itself"),
    ),
    **_refused("disaggregated_params max_dynamic_patch min_dynamic_patch use_audio_in_video"),
    **_refused("system instructions", _SYSTEM),
    **_refused("input", Unsupported(instead="send messages to /v1/chat/completions, or prompt to /v1/completions")),
    **_refused("template raw", Unsupported(instead="send prompt to /v1/completions, which uses no template")),
    **_refused("context previous_response_id conversation", Unsupported(instead="send the whole conversation")),
    **_refused("background max_tool_calls"),
    **_refused("data_sources enable_search search_options search_settings citation_options enable_citations"),
    **_refused("search_domain_filter search_recency_filter return_images return_related_questions"),
    **_refused("web_search_options search_parameters", _SEARCH),
    **_refused("provider preset plugins safety_model safe_prompt compliance deferred"),
    # Thinking
    **_refused("think reasoning thinking enable_thinking thinking_budget thinking_token_budget", _THINKING),
    **_refused("reasoning_budget reasoning_budget_tokens thinking_forced_open", _THINKING),
}

CHAT_FIELDS: Fields = {
    **_EVERYWHERE,
    **_refused("stream_reasoning", Unsupported((True,), wishes=(False,))),
    **_refused("reasoning_format", Unsupported(("auto", "deepseek", "parsed"), _SEPARATE)),
    **_refused("functions", Unsupported(instead="send tools")),
    **_refused("function_call", Unsupported(("none", "auto"), "send tool_choice")),
    **_refused("modalities", Unsupported((["text"],))),
    **_refused("verbosity", Unsupported(("medium",))),
    **_refused("audio prediction"),
    **_refused("prompt suffix", Unsupported(instead="a chat has messages; send this to /v1/completions")),
    **_refused("best_of", Unsupported((1,), "send n")),
    **_refused("echo"),
    **_refused("chat_template guideline tool_prompt prompt_mode", _TEMPLATE),
    **_refused(
        "instruction_template instruction_template_str character mode", _TEMPLATE._replace(harmless=("instruct",))
    ),
    **_refused("do_preprocess", Unsupported((True,), "send prompt to /v1/completions", wishes=(False,))),
    **_refused("continue_", _PREFILL),
    **_refused("documents", _DOCUMENTS),
    **_refused("prefix partial", _PREFILL),
}
"""Of POST /v1/chat/completions."""

_CHAT_ONLY = Unsupported(instead="send messages to /v1/chat/completions")

COMPLETION_FIELDS: Fields = {
    **_EVERYWHERE,
    # A completion is text as it comes, thoughts and all.
    **_hints("include_reasoning separate_reasoning stream_reasoning reasoning_format"),
    **_hints("reasoning_effort parallel_tool_calls"),
    **_refused("suffix"),
    **_refused("top_logprobs", _LOGPROBS),
    **_refused("messages tools functions", _CHAT_ONLY),
    **_refused("tool_choice function_call", _CHAT_ONLY._replace(harmless=("none", "auto"))),
    **_refused("add_generation_prompt continue_final_message chat_template chat_template_kwargs documents", _CHAT_ONLY),
}
"""Of POST /v1/completions."""

TOKENIZE_FIELDS: Fields = {
    **_refused("chat_template", _TEMPLATE),
    **_refused("documents", _DOCUMENTS),
    **_refused("mm_processor_kwargs media_io_kwargs truncate_prompt_tokens return_token_offsets with_pieces"),
    **_refused("functions", Unsupported(instead="send tools")),
    **_refused("add_special", Unsupported((True,), "send add_special_tokens", wishes=(False,))),
    **_refused("parse_special", Unsupported((True,), wishes=(False,))),
    **_refused("content", Unsupported(instead="send prompt")),
}
"""Of POST /tokenize. The fields of a chat that do not change its prompt are ignored like unknown ones."""

NESTED_FIELDS: Mapping[type[msgspec.Struct], Fields] = {
    StreamOptions: _refused("include_obfuscation"),
    ResponseFormat: {
        **_hints("name strict description"),
        **_refused("value", Unsupported(instead="send schema", wishes=_ANY_JSON)),
        **_refused("regex regex_schema ebnf grammar pattern structures triggers format", _NO_GRAMMAR),
    },
    ChatMessage: {
        **_hints("annotations cache_control weight reasoning_details provider_specific_fields thinking_blocks"),
        **_refused("function_call", Unsupported(instead="send tool_calls")),
        **_refused("prefix partial", _PREFILL),
        **_refused("audio images tools attachments files"),
    },
    ContentPart: _hints("annotations cache_control prompt_cache_breakpoint"),
    ToolCall: _hints("index cache_control"),
    Tool: {**_hints("cache_control"), **_refused("defer_loading")},
    FunctionDefinition: {
        **_hints("cache_control"),
        **_refused("defer_loading"),
        **_refused("arguments input_schema inputSchema", Unsupported(instead="send parameters")),
    },
    NamedToolChoice: _refused("disable_parallel_tool_use", Unsupported(instead="send parallel_tool_calls")),
}
"""Of what bodies hold."""
