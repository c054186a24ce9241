// Vercel's AI SDK, with its package for servers that are like OpenAI's.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { BASE, FOX, MIA, MODEL, SUM, SUNNY, WEATHER, tell } from "./telling.mjs";

const provider = createOpenAICompatible({
  name: "dynamo_serve",
  baseURL: `${BASE}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(MODEL);
const asked = { model, temperature: 0, maxRetries: 0 };
const Person = z.object({ name: z.string(), age: z.number().int() });

function weather(cities) {
  return tool({
    description: "Get the weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      cities.push(city);
      return SUNNY;
    },
  });
}

async function chat() {
  const answer = await generateText({ ...asked, prompt: SUM });
  return { text: answer.text, finish: answer.finishReason, tokens: answer.usage.totalTokens };
}

async function stream() {
  const streamed = streamText({ ...asked, prompt: FOX });
  const pieces = [];
  for await (const piece of streamed.textStream) pieces.push(piece);
  const whole = await generateText({ ...asked, prompt: FOX });
  return {
    text: pieces.join(""),
    pieces: pieces.length,
    whole: whole.text,
    tokens: [(await streamed.usage).outputTokens],
  };
}

async function tool_loop() {
  const cities = [];
  const answer = await generateText({
    ...asked,
    prompt: WEATHER,
    tools: { get_weather: weather(cities) },
    stopWhen: stepCountIs(3),
  });
  return { text: answer.text, cities, finish: answer.steps.map((step) => step.finishReason) };
}

async function stream_tools() {
  const cities = [];
  const streamed = streamText({
    ...asked,
    prompt: WEATHER,
    tools: { get_weather: weather(cities) },
    stopWhen: stepCountIs(3),
  });
  return { text: await streamed.text, cities };
}

async function required_tool() {
  const { execute, ...told } = weather([]);
  const called = [];
  for (const toolChoice of ["required", { type: "tool", toolName: "get_weather" }]) {
    const answer = await generateText({
      ...asked,
      prompt: WEATHER,
      tools: { get_weather: told },
      toolChoice,
    });
    called.push(answer.toolCalls.map((call) => [call.toolName, call.input]));
  }
  return called;
}

async function generate_object() {
  return (await generateObject({ ...asked, schema: Person, prompt: MIA })).object;
}

async function generate_output() {
  const output = Output.object({ schema: Person });
  return (await generateText({ ...asked, output, prompt: MIA })).output;
}

async function stream_object() {
  const streamed = streamObject({ ...asked, schema: Person, prompt: MIA });
  let parts = 0;
  for await (const _ of streamed.partialObjectStream) parts += 1;
  return { object: await streamed.object, parts };
}

async function generate_choice() {
  const answer = await generateObject({
    ...asked,
    output: "enum",
    enum: ["sunny", "rainy"],
    prompt: WEATHER,
  });
  return answer.object;
}

await tell({
  chat,
  stream,
  tool_loop,
  stream_tools,
  required_tool,
  generate_object,
  generate_output,
  stream_object,
  generate_choice,
});
