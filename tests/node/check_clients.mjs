// The vendors' Node packages against a running server. Not part of the suite:
//   npm install && node check_clients.mjs http://127.0.0.1:8000
// Every check fails loudly; the model may be any that has a chat template.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool } from "ai";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { z } from "zod";

const url = process.argv[2] ?? "http://127.0.0.1:8000";
const messages = [{ role: "user", content: "hi" }];
const schema = {
  type: "object",
  properties: { unit: { enum: ["C", "F"] } },
  required: ["unit"],
  additionalProperties: false,
};
const plain = { enable_thinking: false };

const checks = {
  async "openai: chat, stream, tools, schema"() {
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
    const [model] = (await client.models.list()).data;
    const base = { model: model.id, messages, ...plain };
    const whole = await client.chat.completions.create({ ...base, max_tokens: 5, temperature: 0 });
    const stream = client.chat.completions.stream({
      ...base, max_tokens: 5, temperature: 0, stream_options: { include_usage: true },
    });
    const final = await stream.finalChatCompletion().catch((error) => {
      assert.match(error.message, /length/);
      return stream.currentChatCompletionSnapshot;
    });
    assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
    const tools = [{ type: "function", function: { name: "weather", parameters: schema } }];
    const calls = client.chat.completions.stream({
      ...base, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 300,
    });
    const called = await calls.finalChatCompletion();
    const [call] = called.choices[0].message.tool_calls;
    assert.match(JSON.parse(call.function.arguments).unit, /^[CF]$/);
    const held = await client.chat.completions.create({
      ...base, max_tokens: 200, response_format: { type: "json_schema", json_schema: { name: "x", schema } },
    });
    assert.match(JSON.parse(held.choices[0].message.content).unit, /^[CF]$/);
    await assert.rejects(client.chat.completions.create({ ...base, frobnicate: 1 }), /frobnicate/);
  },

  async "openai: responses"() {
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
    const [model] = (await client.models.list()).data;
    const text = { format: { type: "json_schema", name: "x", schema } };
    const stream = client.responses.stream({
      model: model.id, input: "hi", text, reasoning: { effort: "none" },
    });
    const final = await stream.finalResponse();
    assert.equal(final.status, "completed");
    assert.match(JSON.parse(final.output_text).unit, /^[CF]$/);
  },

  async "@anthropic-ai/sdk: messages, stream, tools"() {
    const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
    const base = { model: "default", messages, thinking: { type: "disabled" } };
    const whole = await client.messages.create({ ...base, max_tokens: 5 });
    assert.equal(whole.stop_reason, "max_tokens");
    const counted = await client.messages.countTokens(base);
    const { input_tokens, cache_read_input_tokens } = whole.usage;
    assert.equal(counted.input_tokens, input_tokens + cache_read_input_tokens);
    const stream = client.messages.stream({
      ...base, max_tokens: 500, tools: [{ name: "weather", input_schema: schema }],
      tool_choice: { type: "any", disable_parallel_tool_use: true },
    });
    const final = await stream.finalMessage();
    assert.equal(final.stop_reason, "tool_use");
    assert.match(final.content[0].input.unit, /^[CF]$/);
  },

  async "ai and @ai-sdk/openai-compatible: text, stream, tools"() {
    const provider = createOpenAICompatible({
      name: "mlxarch", baseURL: `${url}/v1`, includeUsage: true, transformRequestBody: (body) => ({ ...body, ...plain }),
    });
    const model = provider("default");
    const whole = await generateText({ model, prompt: "hi", maxOutputTokens: 5, temperature: 0 });
    const stream = streamText({ model, prompt: "hi", maxOutputTokens: 5, temperature: 0 });
    let text = "";
    for await (const part of stream.textStream) text += part;
    assert.equal(text, whole.text);
    assert.equal(await stream.finishReason, "length");
    assert.equal((await stream.usage).outputTokens, 5);
    const weather = tool({ inputSchema: z.object({ unit: z.enum(["C", "F"]) }) });
    const called = streamText({ model, prompt: "hi", tools: { weather }, toolChoice: "required", maxOutputTokens: 400 });
    const [call] = await called.toolCalls;
    assert.match(call.input.unit, /^[CF]$/);
  },

  async "ollama: chat, stream, schema"() {
    const client = new Ollama({ host: url });
    const [model] = (await client.list()).models;
    const options = { num_predict: 5, temperature: 0 };
    const base = { model: model.name, messages, think: false };
    const whole = await client.chat({ ...base, options });
    let text = "";
    for await (const part of await client.chat({ ...base, options, stream: true })) text += part.message.content;
    assert.equal(text, whole.message.content);
    const held = await client.chat({ ...base, format: schema });
    assert.match(JSON.parse(held.message.content).unit, /^[CF]$/);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok    ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL  ${name}\n${error.stack}`);
  }
}
process.exit(failed ? 1 : 0);
