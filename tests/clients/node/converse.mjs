// node converse.mjs BASE_URL KEY MODEL: a conversation by the official client; prints a word for each part that went well.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Why is the sky blue?" }];
const numTokens = 12;
// The bias keeps the random model from ending early.
const greedy = { model, temperature: 0, max_completion_tokens: numTokens, logit_bias: { 2: -100 } };
const tool = {
  type: "function",
  function: {
    name: "weather",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Oslo", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

const answer = await client.chat.completions.create({ ...greedy, messages });
const text = answer.choices[0].message.content;
assert.ok(text);
assert.equal(answer.choices[0].finish_reason, "length");
assert.equal(answer.usage.completion_tokens, numTokens);
assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + numTokens);
console.log("answer");

let streamed = "";
let usage;
const stream = await client.chat.completions.create({
  ...greedy,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.completion_tokens, numTokens);
console.log("stream");

const asked = await client.chat.completions.create({
  model,
  messages,
  tools: [tool],
  tool_choice: "required",
  parallel_tool_calls: false,
  seed: 1,
});
assert.equal(asked.choices[0].finish_reason, "tool_calls");
const call = asked.choices[0].message.tool_calls[0];
assert.equal(call.function.name, "weather");
assert.ok(["Oslo", "Rome"].includes(JSON.parse(call.function.arguments).city));
console.log("tool");

const after = await client.chat.completions.create({
  ...greedy,
  messages: [...messages, asked.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sunny" }],
  tools: [tool],
  tool_choice: "none",
});
assert.ok(after.choices[0].message.content);
console.log("result");

await assert.rejects(client.chat.completions.create({ model: "gpt-5", messages }), OpenAI.NotFoundError);
await assert.rejects(
  client.chat.completions.create({ model, messages: [{ role: "user", content: "sky ".repeat(2000) }] }),
  (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded",
);
await assert.rejects(new OpenAI({ baseURL, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
console.log("errors");

const endless = await client.chat.completions.create({ ...greedy, messages, max_completion_tokens: 900, stream: true });
for await (const chunk of endless) {
  if (chunk.choices[0]?.delta?.content) break; // leaving the loop closes the connection
}
assert.ok(endless.controller.signal.aborted);
console.log("abort");
