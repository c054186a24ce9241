// The official client for Node.

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { BASE, FOX, GET_WEATHER, MIA, MODEL, SUM, SUNNY, WEATHER, tell } from "./telling.mjs";

const client = new OpenAI({ baseURL: `${BASE}/v1`, apiKey: "none", maxRetries: 0 });
const say = (text) => [{ role: "user", content: text }];
const Person = z.object({ name: z.string(), age: z.number().int() });
const City = z.object({ city: z.string() });

async function models() {
  const names = [];
  for await (const model of await client.models.list()) names.push(model.id);
  return names;
}

async function chat() {
  const answer = await client.chat.completions.create({
    model: MODEL,
    messages: say(SUM),
    temperature: 0,
    n: 1,
    stop: null,
    user: "someone",
  });
  const choice = answer.choices[0];
  return {
    text: choice.message.content,
    finish: choice.finish_reason,
    tokens: answer.usage.total_tokens,
  };
}

async function stream() {
  const asked = await client.chat.completions.create({
    model: MODEL,
    messages: say(FOX),
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  });
  const pieces = [];
  const tokens = [];
  for await (const chunk of asked) {
    if (chunk.choices[0]?.delta.content) pieces.push(chunk.choices[0].delta.content);
    if (chunk.usage) tokens.push(chunk.usage.completion_tokens);
  }
  const whole = await client.chat.completions.create({
    model: MODEL,
    messages: say(FOX),
    temperature: 0,
  });
  return {
    text: pieces.join(""),
    pieces: pieces.length,
    whole: whole.choices[0].message.content,
    tokens,
  };
}

// The client folds the events itself.
async function stream_helper() {
  const kinds = new Set();
  const runner = client.chat.completions.stream({
    model: MODEL,
    messages: say(WEATHER),
    tools: [GET_WEATHER],
    temperature: 0,
  });
  runner.on("chunk", () => kinds.add("chunk"));
  runner.on("tool_calls.function.arguments.done", () => kinds.add("arguments.done"));
  const call = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function;
  return { kinds: [...kinds].sort(), call: [call.name, JSON.parse(call.arguments)] };
}

async function parse() {
  const parsed = await client.chat.completions.parse({
    model: MODEL,
    messages: say(MIA),
    response_format: zodResponseFormat(Person, "person"),
    temperature: 0,
  });
  return parsed.choices[0].message.parsed;
}

// A strict tool made of a zod object, and its arguments as such an object.
async function parse_tool() {
  const parsed = await client.chat.completions.parse({
    model: MODEL,
    messages: say(WEATHER),
    tools: [zodFunction({ name: "GetWeather", parameters: City })],
    tool_choice: "required",
    parallel_tool_calls: false,
    temperature: 0,
  });
  const called = parsed.choices[0].message.tool_calls[0].function;
  return [called.name, called.parsed_arguments];
}

async function tool_loop() {
  const messages = say(WEATHER);
  const asked = { model: MODEL, tools: [GET_WEATHER], temperature: 0 };
  const first = (await client.chat.completions.create({ messages, ...asked })).choices[0];
  const call = first.message.tool_calls[0];
  messages.push(first.message);
  messages.push({ role: "tool", tool_call_id: call.id, content: JSON.stringify(SUNNY) });
  const second = (await client.chat.completions.create({ messages, ...asked })).choices[0];
  return {
    finish: [first.finish_reason, second.finish_reason],
    call: [call.function.name, JSON.parse(call.function.arguments)],
    text: second.message.content,
  };
}

// The client's own loop: it calls the function and sends the result.
async function run_tools() {
  const cities = [];
  const runner = client.chat.completions.runTools({
    model: MODEL,
    messages: say(WEATHER),
    temperature: 0,
    tools: [
      {
        type: "function",
        function: {
          ...GET_WEATHER.function,
          parse: JSON.parse,
          function: ({ city }) => {
            cities.push(city);
            return JSON.stringify(SUNNY);
          },
        },
      },
    ],
  });
  return { text: await runner.finalContent(), cities };
}

async function logprobs() {
  const answer = await client.chat.completions.create({
    model: MODEL,
    messages: say(SUM),
    temperature: 0,
    logprobs: true,
    top_logprobs: 2,
  });
  const content = answer.choices[0].logprobs.content;
  return {
    text: content.map((token) => token.token).join(""),
    tops: content.map((token) => token.top_logprobs.length),
    whole: answer.choices[0].message.content,
  };
}

async function completion() {
  const answer = await client.completions.create({
    model: MODEL,
    prompt: "Hello",
    max_tokens: 4,
    temperature: 0,
  });
  return { finish: answer.choices[0].finish_reason, tokens: answer.usage.completion_tokens };
}

async function responses() {
  const events = client.responses.stream({ model: MODEL, input: FOX, temperature: 0 });
  const pieces = [];
  for await (const event of events) {
    if (event.type === "response.output_text.delta") pieces.push(event.delta);
  }
  const usage = (await events.finalResponse()).usage;
  const whole = await client.responses.create({ model: MODEL, input: FOX, temperature: 0 });
  return {
    text: pieces.join(""),
    pieces: pieces.length,
    whole: whole.output_text,
    tokens: [usage.output_tokens],
  };
}

async function responses_parse() {
  const parsed = await client.responses.parse({
    model: MODEL,
    input: MIA,
    text: { format: zodTextFormat(Person, "person") },
    temperature: 0,
  });
  return parsed.output_parsed;
}

async function embeddings() {
  const input = ["A cat sleeps.", "A page is a run of KV slots."];
  const answer = await client.embeddings.create({ model: MODEL, input });
  return answer.data.map((item) => item.embedding.length);
}

// A fault comes as the client's own class, with the field at fault.
async function refusal() {
  try {
    await client.chat.completions.create({
      model: MODEL,
      messages: say(SUM),
      modalities: ["audio"],
    });
  } catch (error) {
    if (error instanceof OpenAI.BadRequestError) return { param: error.param, code: error.code };
    throw error;
  }
  return null;
}

await tell({
  models,
  chat,
  stream,
  stream_helper,
  parse,
  parse_tool,
  tool_loop,
  run_tools,
  logprobs,
  completion,
  responses,
  responses_parse,
  embeddings,
  refusal,
});
